// What computes the logits of one sequence: TVM's virtual machine, or a list of launches on an OpenCL device.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <vector>

#include "json.h"
#include "safetensors.h"

class Engine {
 public:
  virtual ~Engine() = default;
  // Runs `ids` at the positions from `first` on, after the tokens of earlier calls; the last one's logits.
  virtual std::vector<float> Run(const std::vector<int64_t>& ids, int64_t first) = 0;
};

// The library `model.so` of a checked artifact, on the CPU or an NVIDIA GPU (virtual_machine.cc).
std::unique_ptr<Engine> OpenLibrary(const std::filesystem::path& folder, const json::Object& manifest);
// Its `launches.json`, on the first OpenCL device (opencl.cc; needs -DOPENCL=ON).
std::unique_ptr<Engine> OpenLaunches(const std::filesystem::path& folder, const json::Object& manifest);
