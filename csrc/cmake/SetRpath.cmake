# cmake -DFILE=<library or program> -DRPATH=<search path> -P SetRpath.cmake: where it looks for the libraries it needs.
file(RPATH_SET FILE "${FILE}" NEW_RPATH "${RPATH}")
