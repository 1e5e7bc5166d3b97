# Finds a CBLAS (cblas.h and a library with cblas_sgemm). Sets NSA_CBLAS_FOUND and the target nsa_cblas. Optional:
# without it the host uses its own matrix product.
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
  message(STATUS "CBLAS: not found, matrix products use the built-in loops")
endif()
