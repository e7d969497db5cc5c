# Sqlite::Sqlite, from sqlite3.h and libsqlite3; the static library where there is one, so that the binary runs when copied elsewhere.
find_path(Sqlite_INCLUDE_DIR sqlite3.h)
find_library(Sqlite_LIBRARY NAMES libsqlite3.a sqlite3)
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(Sqlite REQUIRED_VARS Sqlite_LIBRARY Sqlite_INCLUDE_DIR)
if(Sqlite_FOUND AND NOT TARGET Sqlite::Sqlite)
  add_library(Sqlite::Sqlite UNKNOWN IMPORTED)
  set_target_properties(Sqlite::Sqlite PROPERTIES IMPORTED_LOCATION ${Sqlite_LIBRARY} INTERFACE_INCLUDE_DIRECTORIES ${Sqlite_INCLUDE_DIR}
                                                  INTERFACE_LINK_LIBRARIES "m;${CMAKE_DL_LIBS}")
endif()
