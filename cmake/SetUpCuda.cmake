# Finds CUDA, cuBLAS and NCCL for NSA_CUDA=ON; a missing one is an error, never a silent fallback.
# NSA_CUDA_ARCHITECTURES lists the targets of the kernels (CI builds one). Defines the target nsa_nccl.
set(NSA_CUDA_ARCHITECTURES "80;89;90" CACHE STRING "Compute capabilities the CUDA kernels are compiled for")
set(CMAKE_CUDA_ARCHITECTURES ${NSA_CUDA_ARCHITECTURES})

include(CheckLanguage)
if(NOT CMAKE_CUDA_COMPILER)
  # nvcc is often installed outside of the PATH.
  find_program(NSA_NVCC nvcc PATHS $ENV{CUDA_HOME} $ENV{CUDA_PATH} /usr/local/cuda PATH_SUFFIXES bin)
  if(NSA_NVCC)
    set(CMAKE_CUDA_COMPILER ${NSA_NVCC})
  endif()
endif()
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  message(FATAL_ERROR "NSA_CUDA is ON and no CUDA compiler works (nvcc is not on PATH, in CUDA_HOME or in "
                      "/usr/local/cuda); install the CUDA toolkit, set CMAKE_CUDA_COMPILER, or use the host preset")
endif()
enable_language(CUDA)
# CMake 3.25.1 (Debian 12) does not know that nvcc 12 and later support C++20.
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
  list(APPEND CMAKE_CUDA_COMPILE_FEATURES cuda_std_20)
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
find_package(CUDAToolkit 12.0 REQUIRED)

find_path(NSA_NCCL_INCLUDE_DIR nccl.h HINTS ${NCCL_ROOT} $ENV{NCCL_ROOT} ${CUDAToolkit_INCLUDE_DIRS}
          PATH_SUFFIXES include)
find_library(NSA_NCCL_LIBRARY NAMES nccl libnccl.so.2 HINTS ${NCCL_ROOT} $ENV{NCCL_ROOT} ${CUDAToolkit_LIBRARY_DIR}
             PATH_SUFFIXES lib lib64)
if(NOT NSA_NCCL_INCLUDE_DIR OR NOT NSA_NCCL_LIBRARY)
  message(FATAL_ERROR "NSA_CUDA is ON and NCCL is not complete (nccl.h: ${NSA_NCCL_INCLUDE_DIR}, library: "
                      "${NSA_NCCL_LIBRARY}); install NCCL (libnccl-dev) or set NCCL_ROOT")
endif()
message(STATUS "CUDA: ${CMAKE_CUDA_COMPILER_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}; NCCL: ${NSA_NCCL_LIBRARY}")
add_library(nsa_nccl INTERFACE)
target_include_directories(nsa_nccl SYSTEM INTERFACE ${NSA_NCCL_INCLUDE_DIR})
target_link_libraries(nsa_nccl INTERFACE ${NSA_NCCL_LIBRARY} CUDA::cudart)
