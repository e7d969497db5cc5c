# Hdf5::Hdf5: the C library's archive, with the two small ones that it packs with, where there are any; else the shared library.
find_path(Hdf5_INCLUDE_DIR hdf5.h PATH_SUFFIXES hdf5/serial)
find_library(Hdf5_LIBRARY NAMES libhdf5_serial.a libhdf5.a hdf5_serial hdf5 PATH_SUFFIXES hdf5/serial)
find_library(Hdf5_SZ_LIBRARY NAMES libsz.a sz)
find_library(Hdf5_AEC_LIBRARY NAMES libaec.a aec)
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(Hdf5Archive REQUIRED_VARS Hdf5_LIBRARY Hdf5_INCLUDE_DIR Hdf5_SZ_LIBRARY Hdf5_AEC_LIBRARY)
if(Hdf5Archive_FOUND AND NOT TARGET Hdf5::Hdf5)
  add_library(Hdf5::Hdf5 UNKNOWN IMPORTED)
  set_target_properties(Hdf5::Hdf5 PROPERTIES IMPORTED_LOCATION ${Hdf5_LIBRARY} INTERFACE_INCLUDE_DIRECTORIES ${Hdf5_INCLUDE_DIR}
                        INTERFACE_LINK_LIBRARIES "${Hdf5_SZ_LIBRARY};${Hdf5_AEC_LIBRARY};ZLIB::ZLIB;m;dl")
endif()
