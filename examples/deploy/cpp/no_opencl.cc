// In place of opencl.cc where there is no OpenCL.
#include "engine.h"

std::unique_ptr<Engine> OpenLaunches(const std::filesystem::path& folder, const json::Object&) {
  throw UserError(folder.string() + ": compiled for OpenCL or WebGPU; build this program with -DOPENCL=ON");
}
