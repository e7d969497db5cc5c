# embed_texts(OUT.cpp FUNCTION FILE...): a C++ file whose FUNCTION() returns the texts of the files, in their order.
set(_embed_script ${CMAKE_CURRENT_LIST_DIR}/EmbedTexts.cmake)
function(embed_texts out function)
  add_custom_command(OUTPUT ${out} DEPENDS ${ARGN} ${_embed_script} VERBATIM
    COMMAND ${CMAKE_COMMAND} -DOUT=${out} -DFUNCTION=${function} "-DFILES=${ARGN}" -P ${_embed_script})
endfunction()
