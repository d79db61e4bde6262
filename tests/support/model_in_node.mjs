// Runs an artifact's model.js in Node, on Dawn: `node model_in_node.mjs URL FOLDER JOB`, where FOLDER has
// `npm install webgpu` and JOB is {"parts": [[id, ...], ...], "prompt": [id, ...], "tokens": N} in JSON.
import { createRequire } from "node:module";

const [url, folder, job] = process.argv.slice(2);
const { create, globals } = createRequire(`${folder}/`)("webgpu");
Object.assign(globalThis, globals);
Object.defineProperty(globalThis, "navigator", { value: { gpu: create(["backend=vulkan"]) } });

const source = await (await fetch(`${url}/model.js`)).text();
const { Model } = await import(`data:text/javascript,${encodeURIComponent(source)}`);
const model = await Model.load(url), { parts, prompt, tokens } = JSON.parse(job);
const logits = [], ids = [];
for (const part of parts) for (const value of await model.extend(part, true)) logits.push(value);
model.reset();
for await (const id of model.generate(prompt, { maxTokens: tokens })) ids.push(id);
process.stdout.write(JSON.stringify({ precision: model.precision, logits, ids }), () => process.exit());
