# Run by embed_texts at build time.
set(text "#include <string_view>\n#include <vector>\n\nstd::vector<std::string_view> ${FUNCTION}() {\n  return {\n")
foreach(file IN LISTS FILES)
  file(READ ${file} content)
  string(APPEND text "R\"embedded(${content})embedded\",\n")
endforeach()
string(APPEND text "  };\n}\n")
file(WRITE ${OUT} "${text}")
