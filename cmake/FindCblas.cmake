# Finds a CBLAS (cblas.h and a library that has cblas_sgemm). Sets NSA_CBLAS_FOUND and the target nsa_cblas.
# The program builds and is right without one.
find_path(NSA_CBLAS_INCLUDE_DIR NAMES cblas.h PATH_SUFFIXES openblas openblas-pthread)
find_library(NSA_CBLAS_LIBRARY NAMES openblas blis cblas)
if(NSA_CBLAS_INCLUDE_DIR AND NSA_CBLAS_LIBRARY)
  set(NSA_CBLAS_FOUND TRUE)
  add_library(nsa_cblas INTERFACE)
  target_include_directories(nsa_cblas SYSTEM INTERFACE ${NSA_CBLAS_INCLUDE_DIR})
  target_link_libraries(nsa_cblas INTERFACE ${NSA_CBLAS_LIBRARY})
  message(STATUS "CBLAS: ${NSA_CBLAS_LIBRARY}")
else()
  set(NSA_CBLAS_FOUND FALSE)
  message(STATUS "CBLAS: none found, matrix products use our own loops")
endif()
