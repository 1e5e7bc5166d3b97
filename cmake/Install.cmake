# What `cmake --install` and CPack install: the program, what its users run and copy, and licences. The prefix may be
# moved: nothing in it names it. Packages: `cpack -G DEB` or `cpack -G TGZ` in the build folder.
include(GNUInstallDirs)
set(CMAKE_INSTALL_RPATH_USE_LINK_PATH ON)  # libraries of modules and Spack are found without LD_LIBRARY_PATH
set(NSA_DATA ${CMAKE_INSTALL_DATADIR}/nsa)

install(DIRECTORY inputs machines DESTINATION ${NSA_DATA})
install(DIRECTORY examples DESTINATION ${NSA_DATA})
install(FILES LICENSE cmake/THIRD_PARTY_LICENSES README.md CHANGELOG.md DESTINATION ${CMAKE_INSTALL_DOCDIR})
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR} RENAME copyright)  # where Debian looks for it

# Job scripts and the sweep start the nsa of PATH and not that of a build folder.
file(GLOB scripts CONFIGURE_DEPENDS RELATIVE ${PROJECT_SOURCE_DIR} jobscripts/slurm/* scripts/sweep.py scripts/sweeps/*.py)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${scripts})
foreach(script ${scripts})
  file(READ ${script} text)
  string(REGEX REPLACE "build/(host|cuda)/nsa" "nsa" text "${text}")
  file(CONFIGURE OUTPUT ${PROJECT_BINARY_DIR}/installed/${script} CONTENT "${text}" @ONLY)
  get_filename_component(folder ${script} DIRECTORY)
  if(script MATCHES "slurm/.*\\.sh$|sweep\\.py$")
    install(PROGRAMS ${PROJECT_BINARY_DIR}/installed/${script} DESTINATION ${NSA_DATA}/${folder})
  else()
    install(FILES ${PROJECT_BINARY_DIR}/installed/${script} DESTINATION ${NSA_DATA}/${folder})
  endif()
endforeach()

set(CPACK_PACKAGE_CONTACT "the nsa authors")
set(CPACK_PACKAGE_VENDOR "nsa")
set(CPACK_RESOURCE_FILE_LICENSE ${PROJECT_SOURCE_DIR}/LICENSE)
set(CPACK_GENERATOR TGZ DEB)
set(CPACK_STRIP_FILES ON)
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_PACKAGE_MAINTAINER ${CPACK_PACKAGE_CONTACT})
set(CPACK_DEBIAN_PACKAGE_SECTION science)
set(CPACK_DEBIAN_PACKAGE_RECOMMENDS "openmpi-bin, python3")  # mpirun; scripts/sweep.py
find_program(NSA_SHLIBDEPS dpkg-shlibdeps)  # of dpkg-dev; without it the package names no libraries
if(NSA_SHLIBDEPS)
  set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS ON)
endif()
include(CPack)
