# Event::Event, from event2/http.h, libevent and libevent_pthreads; static libraries where there are such, so that the binary runs when copied elsewhere.
find_path(Event_INCLUDE_DIR event2/http.h)
find_library(Event_LIBRARY NAMES libevent.a event)
find_library(Event_PTHREADS_LIBRARY NAMES libevent_pthreads.a event_pthreads)
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(Event REQUIRED_VARS Event_LIBRARY Event_PTHREADS_LIBRARY Event_INCLUDE_DIR)
if(Event_FOUND AND NOT TARGET Event::Event)
  add_library(Event::Event UNKNOWN IMPORTED)
  set_target_properties(Event::Event PROPERTIES IMPORTED_LOCATION ${Event_PTHREADS_LIBRARY} INTERFACE_INCLUDE_DIRECTORIES ${Event_INCLUDE_DIR}
                                                INTERFACE_LINK_LIBRARIES ${Event_LIBRARY})
endif()
