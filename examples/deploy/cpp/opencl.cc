// Runs the kernels of `launches.json` on an OpenCL device: what moqc/runtime/opencl.py does, without Python.
#define CL_TARGET_OPENCL_VERSION 120
#include <CL/cl.h>

#include <algorithm>
#include <array>

#include "engine.h"

namespace ffi = tvm::ffi;

namespace {

using Sizes = std::map<std::string, int64_t>;

void Check(cl_int status, const std::string& what) {
  if (status != CL_SUCCESS) throw UserError("OpenCL: " + what + " failed (" + std::to_string(status) + ")");
}

int64_t Apply(const std::string& operation, int64_t a, int64_t b) {
  if (operation == "+") return a + b;
  if (operation == "-") return a - b;
  if (operation == "*") return a * b;
  if (operation == "/") return a / b;  // operands are not negative
  if (operation == "%") return a % b;
  if (operation == "min") return std::min(a, b);
  if (operation == "max") return std::max(a, b);
  if (operation == "==") return a == b;
  if (operation == "!=") return a != b;
  if (operation == "<") return a < b;
  if (operation == "<=") return a <= b;
  if (operation == "and") return a && b;
  if (operation == "or") return a || b;
  throw UserError("launches.json: an unknown operator " + operation);
}

// The value of an expression: a number, a variable's name, or [operator, a, b].
int64_t Evaluate(const ffi::Any& expression, const Sizes& sizes) {
  if (auto number = expression.try_cast<int64_t>()) return *number;
  if (auto name = expression.try_cast<ffi::String>()) return sizes.at(std::string(*name));
  auto parts = expression.cast<json::Array>();
  std::string operation(parts[0].cast<ffi::String>());
  return Apply(operation, Evaluate(parts[1], sizes), Evaluate(parts[2], sizes));
}

cl_device_id FirstDevice() {
  cl_uint count = 0;
  if (clGetPlatformIDs(0, nullptr, &count) != CL_SUCCESS) count = 0;
  std::vector<cl_platform_id> platforms(count);
  if (count) Check(clGetPlatformIDs(count, platforms.data(), nullptr), "listing the platforms");
  for (cl_platform_id platform : platforms) {
    cl_device_id device;
    if (clGetDeviceIDs(platform, CL_DEVICE_TYPE_ALL, 1, &device, nullptr) == CL_SUCCESS) return device;
  }
  throw UserError("no OpenCL device: install the driver of yours, or `apt install pocl-opencl-icd`");
}

// Whether the device computes with 16-bit floats.
bool HasHalf(cl_device_id device) {
  size_t size = 0;
  Check(clGetDeviceInfo(device, CL_DEVICE_EXTENSIONS, 0, nullptr, &size), "asking for the extensions");
  std::string names(size, '\0');
  Check(clGetDeviceInfo(device, CL_DEVICE_EXTENSIONS, size, names.data(), nullptr), "asking for the extensions");
  return names.find("cl_khr_fp16") != std::string::npos;
}

// The program lives as long as the model: what OpenCL gives is not given back before the process ends.
class Launches : public Engine {
 public:
  Launches(const std::filesystem::path& folder, const json::Object& manifest) {
    json::Object content = ParseObject(ReadFile(folder / "launches.json"), (folder / "launches.json").string());
    if (GetString(content, "language") != "opencl") throw UserError(folder.string() + ": a page for browsers");
    main_ = Get<json::Object>(content, "main");
    device_ = FirstDevice();
    cl_int status;
    context_ = clCreateContext(nullptr, 1, &device_, nullptr, nullptr, &status);
    Check(status, "opening the device");
    queue_ = clCreateCommandQueue(context_, device_, 0, &status);
    Check(status, "opening a queue");
    MakeBuffers(WeightFiles(folder, manifest));
    const std::string types = GetString(Get<json::Object>(content, "types"), HasHalf(device_) ? "float16" : "float32");
    MakeKernels(types + GetString(content, "preamble"), Get<json::Object>(content, "kernels"));
  }

  std::vector<float> Run(const std::vector<int64_t>& ids, int64_t first) override {
    std::vector<int32_t> tokens(ids.begin(), ids.end()), positions;
    for (size_t i = 0; i < ids.size(); ++i) positions.push_back(static_cast<int32_t>(first + i));
    const Sizes sizes = PutInputs({tokens, positions});
    for (const auto& launch : Get<json::Array>(main_, "launches")) Launch(launch.cast<json::Object>(), sizes);
    auto output = Get<json::Array>(main_, "outputs")[0].cast<json::Object>();
    auto shape = Get<json::Array>(output, "shape");  // [1, count, vocabulary]
    size_t rows = Evaluate(shape[1], sizes), width = Evaluate(shape[2], sizes);
    std::vector<float> logits(width);
    size_t bytes = width * sizeof(float);
    cl_mem buffer = buffers_[Get<int64_t>(output, "buffer")];
    Check(clEnqueueReadBuffer(queue_, buffer, CL_TRUE, (rows - 1) * bytes, bytes, logits.data(), 0, nullptr, nullptr),
          "reading the logits");
    return logits;
  }

 private:
  struct Kernel {
    cl_kernel handle;
    std::array<size_t, 3> threads;
  };

  void MakeBuffers(const WeightFiles& files) {
    for (const auto& entry : Get<json::Array>(main_, "buffers")) {
      auto buffer = entry.cast<json::Object>();
      std::vector<char> content(Get<int64_t>(buffer, "bytes"));  // caches begin with zeros
      FillConstant(GetString(buffer, "constant"), &content);
      FillWeights(Get<json::Array>(buffer, "weights"), files, &content);
      cl_int status;
      cl_mem_flags flags = CL_MEM_READ_WRITE | CL_MEM_COPY_HOST_PTR;
      buffers_.push_back(clCreateBuffer(context_, flags, content.size(), content.data(), &status));
      Check(status, "a buffer of " + std::to_string(content.size()) + " bytes");
    }
  }

  static void FillConstant(const std::string& digits, std::vector<char>* content) {
    for (size_t i = 0; i + 1 < digits.size(); i += 2) {
      (*content)[i / 2] = static_cast<char>(std::stoi(digits.substr(i, 2), nullptr, 16));
    }
  }

  static void FillWeights(const json::Array& tensors, const WeightFiles& files, std::vector<char>* content) {
    const std::map<std::string, size_t> widths = {{"uint8", 1}, {"float16", 2}, {"int32", 4}, {"float32", 4}};
    size_t offset = 0;
    for (const auto& entry : tensors) {
      auto tensor = entry.cast<json::Object>();
      std::string dtype = GetString(tensor, "dtype");
      std::vector<int64_t> shape = Integers(Get<json::Array>(tensor, "shape"));
      size_t bytes = widths.at(dtype);
      for (int64_t extent : shape) bytes *= extent;
      CopyTo(files.Find(GetString(tensor, "name"), shape), dtype, content->data() + offset, bytes);
      offset += bytes;
    }
  }

  void MakeKernels(const std::string& preamble, const json::Object& kernels) {
    for (const auto& [key, value] : kernels) {
      auto kernel = value.cast<json::Object>();
      std::string name(key.cast<ffi::String>()), text = preamble + GetString(kernel, "source");
      const char* source = text.c_str();
      cl_int status;
      cl_program program = clCreateProgramWithSource(context_, 1, &source, nullptr, &status);
      Check(status, name);
      Check(clBuildProgram(program, 1, &device_, "", nullptr, nullptr), "compiling " + name);
      Kernel made{clCreateKernel(program, name.c_str(), &status), {}};
      Check(status, name);
      std::vector<int64_t> threads = Integers(Get<json::Array>(kernel, "threads"));
      std::copy(threads.begin(), threads.end(), made.threads.begin());
      kernels_[name] = made;
    }
  }

  // Fills the inputs, [1, count] each; the variables of their shapes.
  Sizes PutInputs(const std::vector<std::vector<int32_t>>& inputs) {
    Sizes sizes;
    size_t number = 0;
    for (const auto& entry : Get<json::Array>(main_, "buffers")) {
      auto buffer = entry.cast<json::Object>();
      cl_mem memory = buffers_[number++];
      if (GetString(buffer, "role") != "input") continue;
      const std::vector<int32_t>& values = inputs.at(Get<int64_t>(buffer, "number"));
      Check(clEnqueueWriteBuffer(queue_, memory, CL_TRUE, 0, values.size() * sizeof(int32_t), values.data(), 0,
                                 nullptr, nullptr),
            "writing the inputs");
      auto shape = Get<json::Array>(buffer, "shape");
      const std::array<int64_t, 2> extents = {1, static_cast<int64_t>(values.size())};
      for (size_t axis = 0; axis < extents.size(); ++axis) {
        if (auto name = shape[axis].try_cast<ffi::String>()) sizes[std::string(*name)] = extents[axis];
      }
    }
    return sizes;
  }

  void Launch(const json::Object& launch, const Sizes& sizes) {
    if (Has(launch, "when") && !Evaluate(launch.at(ffi::String("when")), sizes)) return;
    const Kernel& kernel = kernels_.at(GetString(launch, "kernel"));
    std::array<size_t, 3> global;
    auto grid = Get<json::Array>(launch, "grid");
    for (size_t axis = 0; axis < global.size(); ++axis) {
      global[axis] = Evaluate(grid[axis], sizes) * kernel.threads[axis];
      if (global[axis] == 0) return;
    }
    cl_uint argument = 0;
    for (int64_t number : Integers(Get<json::Array>(launch, "buffers"))) {
      Check(clSetKernelArg(kernel.handle, argument++, sizeof(cl_mem), &buffers_[number]), "an argument");
    }
    for (const auto& scalar : Get<json::Array>(launch, "scalars")) {
      cl_int value = static_cast<cl_int>(Evaluate(scalar, sizes));
      Check(clSetKernelArg(kernel.handle, argument++, sizeof(value), &value), "an argument");
    }
    Check(clEnqueueNDRangeKernel(queue_, kernel.handle, 3, nullptr, global.data(), kernel.threads.data(), 0, nullptr,
                                 nullptr),
          "launching " + GetString(launch, "kernel"));
  }

  json::Object main_;
  cl_device_id device_;
  cl_context context_;
  cl_command_queue queue_;
  std::vector<cl_mem> buffers_;
  std::map<std::string, Kernel> kernels_;
};

}  // namespace

std::unique_ptr<Engine> OpenLaunches(const std::filesystem::path& folder, const json::Object& manifest) {
  return std::make_unique<Launches>(folder, manifest);
}
