# Finds the folder of a library that is a header only: `variable`, which a user may set.
macro(nsa_find_header level name header package variable)
  find_path(${variable} ${header})
  if(NOT ${variable} AND "${level}" STREQUAL REQUIRED)
    get_filename_component(nsa_folder ${header} DIRECTORY)
    message(FATAL_ERROR "${name} is not there (no ${header}); install ${package}, or set ${variable} to the folder that "
                        "holds ${nsa_folder}/")
  endif()
endmacro()

# Finds the libraries that every build needs, and a CBLAS where there is one. `level`: REQUIRED or QUIET.
macro(nsa_find_libraries level)
  find_package(MPI ${level} COMPONENTS C)
  find_package(HDF5 ${level} COMPONENTS C HL)
  find_package(Threads ${level})
  find_package(OpenMP ${level} COMPONENTS CXX)
  find_package(fmt ${level})
  find_package(CLI11 ${level})
  nsa_find_header(${level} toml++ toml++/toml.h libtomlplusplus-dev TOMLPLUSPLUS_INCLUDE_DIR)
  nsa_find_header(${level} nlohmann-json nlohmann/json.hpp nlohmann-json3-dev NLOHMANN_JSON_INCLUDE_DIR)
  if(NSA_BLAS)
    include(FindCblas)
  endif()
endmacro()

# NSA_PROBE=ON (scripts/setup.sh): prints "found: NAME" for each library that this machine has, and builds nothing.
function(nsa_print_libraries)
  nsa_find_libraries(QUIET)
  find_package(Catch2 QUIET)
  set(CXX_FOUND TRUE)  # project() has found it
  set(toml++_FOUND ${TOMLPLUSPLUS_INCLUDE_DIR})
  set(nlohmann-json_FOUND ${NLOHMANN_JSON_INCLUDE_DIR})
  set(CBLAS_FOUND ${NSA_CBLAS_FOUND})
  foreach(name CXX MPI HDF5 fmt CLI11 toml++ nlohmann-json CBLAS Catch2)
    if(${name}_FOUND)
      message(STATUS "found: ${name}")
    endif()
  endforeach()
endfunction()
