// Runs a compiled model's launches on WebGPU: what moqc/runtime/opencl.py is for OpenCL.

const OPERATORS = {
  "+": (a, b) => a + b,
  "-": (a, b) => a - b,
  "*": (a, b) => a * b,
  "/": (a, b) => Math.floor(a / b),
  "%": (a, b) => a % b,
  "min": Math.min,
  "max": Math.max,
  "==": (a, b) => Number(a === b),
  "!=": (a, b) => Number(a !== b),
  "<": (a, b) => Number(a < b),
  "<=": (a, b) => Number(a <= b),
  "and": (a, b) => Number(Boolean(a && b)),
  "or": (a, b) => Number(Boolean(a || b)),
};
const UNIFORM_STRIDE = 256; // minUniformBufferOffsetAlignment of every adapter

// The value of an expression of launches.json: a number, a variable's name, or [operator, a, b].
function evaluate(expression, variables) {
  if (typeof expression === "number") return expression;
  if (typeof expression === "string") return variables[expression];
  const [operator, first, second] = expression;
  return OPERATORS[operator](evaluate(first, variables), evaluate(second, variables));
}

async function fetchChecked(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path}: ${response.status} ${response.statusText}`);
  return response;
}

const HALF = "shader-f16";

// A device with the largest buffers the adapter has, and with 16-bit floats if it has them.
async function openDevice(launches) {
  if (!navigator.gpu) throw new Error("this browser has no WebGPU: use a current Chrome, Edge, Firefox or Safari");
  const adapter = await navigator.gpu.requestAdapter();
  if (!adapter) throw new Error("WebGPU has no adapter here: update the GPU's driver");
  const names = ["maxStorageBufferBindingSize", "maxBufferSize"];
  const requiredLimits = Object.fromEntries(names.map((name) => [name, adapter.limits[name]]));
  const largest = Math.max(...launches.main.buffers.map((buffer) => buffer.bytes));
  if (largest > adapter.limits.maxStorageBufferBindingSize) {
    throw new Error(`the model needs buffers of ${largest} bytes, this GPU binds ` +
                    `${adapter.limits.maxStorageBufferBindingSize}`);
  }
  const requiredFeatures = adapter.features.has(HALF) ? [HALF] : [];
  return adapter.requestDevice({ requiredFeatures, requiredLimits });
}

// bfloat16 and float16 as float32, everything else as it is stored.
function widened(bytes, stored, dtype) {
  if (dtype !== "float32" || stored === "F32") return bytes;
  const halves = new Uint16Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 2);
  const words = new Uint32Array(halves.length);
  if (stored === "BF16") {
    halves.forEach((half, i) => { words[i] = half << 16; });
    return new Uint8Array(words.buffer);
  }
  if (stored !== "F16") throw new Error(`a tensor stored as ${stored} cannot be used as float32`);
  const floats = new Float32Array(words.buffer);
  halves.forEach((half, i) => {
    const exponent = (half >> 10) & 31, fraction = half & 1023, sign = half >> 15 ? -1 : 1;
    if (exponent === 31) floats[i] = fraction ? NaN : sign * Infinity;
    else floats[i] = sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
  });
  return new Uint8Array(floats.buffer);
}

export class Model {
  // Load an artifact's folder: launches, manifest, parameters. `progress` gets the share that is there.
  static async load(folder, progress = () => {}) {
    const [launches, manifest] = await Promise.all(
      ["launches.json", "moqc.json"].map(async (name) => (await fetchChecked(`${folder}/${name}`)).json()));
    const model = new Model();
    model.manifest = manifest;
    model.launches = launches;
    model.device = await openDevice(launches);
    model.device.lost.then((info) => { model.lost = info.message || info.reason; });
    model.allocate();
    await model.readParameters(folder, progress);
    await model.compile();
    model.length = 0;
    return model;
  }

  allocate() {
    const usage = GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_DST | GPUBufferUsage.COPY_SRC;
    const { device } = this;
    this.buffers = this.launches.main.buffers.map((buffer) => device.createBuffer({ size: buffer.bytes, usage }));
    this.places = new Map(); // parameter -> [buffer, offset, dtype], several where it is in several buffers
    this.launches.main.buffers.forEach((buffer, number) => {
      if (buffer.constant) {
        const bytes = Uint8Array.from(buffer.constant.match(/../g), (digits) => parseInt(digits, 16));
        device.queue.writeBuffer(this.buffers[number], 0, bytes);
      }
      let offset = 0;
      for (const tensor of buffer.weights) {
        const width = { uint8: 1, float16: 2, int32: 4, float32: 4 }[tensor.dtype];
        if (!this.places.has(tensor.name)) this.places.set(tensor.name, []);
        this.places.get(tensor.name).push([this.buffers[number], offset, tensor.dtype]);
        offset += width * tensor.shape.reduce((a, b) => a * b, 1);
      }
    });
  }

  // Read the safetensors files one after the other: at most one is in memory.
  async readParameters(folder, progress) {
    const names = Object.keys(this.manifest.files).filter((name) => name.endsWith(".safetensors")).sort();
    const total = names.reduce((sum, name) => sum + this.manifest.files[name].bytes, 0);
    let read = 0;
    for (const name of names) {
      const file = await (await fetchChecked(`${folder}/${name}`)).arrayBuffer();
      if (file.byteLength !== this.manifest.files[name].bytes) throw new Error(`${name}: incomplete`);
      const length = Number(new DataView(file).getBigUint64(0, true));
      const header = JSON.parse(new TextDecoder().decode(new Uint8Array(file, 8, length)));
      for (const [tensor, entry] of Object.entries(header)) {
        const [start, stop] = entry.data_offsets;
        const bytes = new Uint8Array(file, 8 + length + start, stop - start);
        for (const [buffer, offset, dtype] of this.places.get(tensor) ?? []) {
          this.device.queue.writeBuffer(buffer, offset, widened(bytes, entry.dtype, dtype));
        }
      }
      read += file.byteLength;
      progress(read / total);
    }
  }

  async compile() {
    const { device, launches } = this;
    const pipelines = new Map();
    this.precision = device.features.has(HALF) ? "float16" : "float32";
    const before = launches.types[this.precision] + launches.preamble;
    await Promise.all(Object.entries(launches.kernels).map(async ([name, kernel]) => {
      const module = device.createShaderModule({ code: before + kernel.source, label: name });
      const compute = { module, entryPoint: name };
      pipelines.set(name, await device.createComputePipelineAsync({ layout: "auto", compute, label: name }));
    }));
    const size = launches.main.launches.length * UNIFORM_STRIDE;
    const usage = GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST;
    this.uniforms = device.createBuffer({ size, usage });
    this.steps = launches.main.launches.map((launch, number) => {
      const pipeline = pipelines.get(launch.kernel), { scalars } = launches.kernels[launch.kernel];
      const entries = launch.buffers.map((buffer, binding) =>
        ({ binding, resource: { buffer: this.buffers[buffer] } }));
      const block = { buffer: this.uniforms, offset: number * UNIFORM_STRIDE, size: 4 * (scalars + 1) };
      entries.push({ binding: launch.buffers.length, resource: block });
      return { launch, pipeline, group: device.createBindGroup({ layout: pipeline.getBindGroupLayout(0), entries }) };
    });
  }

  // Grids beyond the limit of one dimension continue in the third, as the kernels expect.
  packed(grid) {
    const limit = this.device.limits.maxComputeWorkgroupsPerDimension;
    let [x, y] = grid, z = 1;
    if (y > limit) throw new Error(`a launch of ${y} rows of work-groups, this GPU has ${limit}`);
    while (x > limit) { x = Math.ceil(x / 2); z *= 2; }
    return [x, y, z];
  }

  // Append tokens; the logits (Float32Array) of the last one, or of all with `every`.
  async extend(tokens, every = false) {
    const { context, chunk } = this.manifest.cache;
    if (this.length + tokens.length > context) throw new Error(`the context of ${context} tokens is full`);
    let logits;
    const parts = [];
    for (let at = 0; at < tokens.length; at += chunk) {
      const part = tokens.slice(at, at + chunk);
      logits = await this.run(part, every);
      parts.push(logits);
    }
    if (!every) return logits;
    const all = new Float32Array(parts.reduce((sum, part) => sum + part.length, 0));
    parts.reduce((at, part) => { all.set(part, at); return at + part.length; }, 0);
    return all;
  }

  async run(tokens, every) {
    const { device } = this, main = this.launches.main, sizes = { batch: 1, seq: tokens.length };
    const positions = tokens.map((_, number) => this.length + number);
    const inputs = [tokens, positions].map((values) => Int32Array.from(values));
    main.buffers.forEach((buffer, number) => {
      if (buffer.role === "input") device.queue.writeBuffer(this.buffers[number], 0, inputs[buffer.number]);
    });
    const scalars = new Int32Array(this.steps.length * UNIFORM_STRIDE / 4);
    const encoder = device.createCommandEncoder();
    const pass = encoder.beginComputePass();
    this.steps.forEach(({ launch, pipeline, group }, number) => {
      if (launch.when !== null && !evaluate(launch.when, sizes)) return;
      const grid = launch.grid.map((extent) => evaluate(extent, sizes));
      if (grid.includes(0)) return;
      const values = launch.scalars.map((scalar) => evaluate(scalar, sizes));
      scalars.set([...values, grid[0] - 1], number * UNIFORM_STRIDE / 4);
      pass.setPipeline(pipeline);
      pass.setBindGroup(0, group);
      pass.dispatchWorkgroups(...this.packed(grid));
    });
    pass.end();
    device.queue.writeBuffer(this.uniforms, 0, scalars);
    const count = every ? tokens.length : 1, row = 4 * this.manifest.vocabulary;
    const result = device.createBuffer(
      { size: count * row, usage: GPUBufferUsage.MAP_READ | GPUBufferUsage.COPY_DST });
    const logits = this.buffers[main.outputs[0].buffer];
    encoder.copyBufferToBuffer(logits, (tokens.length - count) * row, result, 0, count * row);
    device.queue.submit([encoder.finish()]);
    await result.mapAsync(GPUMapMode.READ);
    const values = new Float32Array(result.getMappedRange().slice(0));
    result.destroy();
    if (this.lost) throw new Error(`the GPU was lost: ${this.lost}`);
    this.length += tokens.length;
    return values;
  }

  // Forget all tokens.
  reset() {
    this.length = 0;
  }

  // Token ids that follow `tokens`: greedy at temperature 0, else sampled.
  async *generate(tokens, { maxTokens = 64, temperature = 0 } = {}) {
    const ends = new Set(this.manifest.generation.eos_token_ids);
    let logits = await this.extend(tokens);
    for (let count = 0; count < maxTokens; count++) {
      const next = choose(logits, temperature);
      if (ends.has(next)) return;
      yield next;
      if (this.length >= this.manifest.cache.context) return;
      logits = await this.extend([next]);
    }
  }
}

// The likeliest token, the lowest of equal ones, or one drawn from the distribution at `temperature`.
function choose(logits, temperature) {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  if (temperature <= 0) return best;
  const weights = logits.map((value) => Math.exp((value - logits[best]) / temperature));
  let left = Math.random() * weights.reduce((a, b) => a + b, 0);
  for (let i = 0; i < weights.length; i++) {
    left -= weights[i];
    if (left <= 0) return i;
  }
  return best;
}
