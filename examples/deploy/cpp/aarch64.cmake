# For cmake -DCMAKE_TOOLCHAIN_FILE=aarch64.cmake -DROOT=<folder with the board's libraries>: cross-compile for
# 64-bit ARM under Linux. ROOT holds usr/include/pcre2.h and usr/lib/aarch64-linux-gnu/libpcre2-8.so.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES ROOT)
set(PCRE2 "${ROOT}/usr/lib/aarch64-linux-gnu/libpcre2-8.so" CACHE FILEPATH "")
set(PCRE2_INCLUDE "${ROOT}/usr/include" CACHE PATH "")
