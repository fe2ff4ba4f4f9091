"use strict";

const SIDE = 160; // of a drawn picture, in pixels
const byId = (id) => document.getElementById(id);
let tiers = []; // ids of models, the default first
let automatic = ""; // id of the model whose tier is chosen by max_ms
let running = null; // AbortController of the request that is being answered

function headers() {
  const key = byId("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function checked(response) {
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message ?? `HTTP ${response.status}`);
}

async function loadModels() {
  const response = await checked(await fetch("/v1/models", { headers: headers() }));
  const ids = (await response.json()).data.map((model) => model.id);
  automatic = ids[0];
  tiers = ids.slice(1);
  byId("name").textContent = automatic;
  byId("tier").max = String(tiers.length - 1);
  showTier();
}

function showTier() {
  const id = tiers[Number(byId("tier").value)] ?? "";
  byId("tier-name").textContent = id.slice(automatic.length + 1);
  byId("tier").disabled = byId("limited").checked;
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("the picture cannot be read"));
    reader.readAsDataURL(file);
  });
}

async function requestBody() {
  const file = byId("file").files[0];
  const text = { type: "text", text: byId("question").value };
  const picture = file ? [{ type: "image_url", image_url: { url: await dataUrl(file) } }] : [];
  const limited = byId("limited").checked;
  return {
    model: limited ? automatic : tiers[Number(byId("tier").value)],
    ...(limited ? { max_ms: Number(byId("ms").value) } : {}),
    max_completion_tokens: Number(byId("tokens").value),
    messages: [{ role: "user", content: [...picture, text] }],
  };
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function answer(body, signal) {
  const options = { method: "POST", headers: headers(), body: JSON.stringify({ ...body, stream: true }), signal };
  const response = await checked(await fetch("/v1/chat/completions", options));
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    byId("answer").textContent += event.choices[0]?.delta.content ?? "";
    const about = event.dop_compile;
    if (about) {
      const [first, total] = [about.first_token_ms, about.total_ms].map((ms) => Math.round(ms));
      byId("times").textContent = `tier ${about.tier}: first token after ${first} ms, all after ${total} ms`;
    }
  }
}

function runs(read) {
  const found = [];
  read.forEach((tokens, layer) => {
    const content = tokens.join();
    const last = found.at(-1);
    if (last && last.content === content) last.last = layer;
    else found.push({ content, tokens: new Set(tokens), first: layer, last: layer });
  });
  return found;
}

function drawPicture(context, picture, cropped) {
  const { width, height } = context.canvas;
  const scale = Math.max(width / picture.width, height / picture.height);
  const [w, h] = cropped ? [width / scale, height / scale] : [picture.width, picture.height];
  context.drawImage(picture, (picture.width - w) / 2, (picture.height - h) / 2, w, h, 0, 0, width, height);
}

function drawn(picture, grid, cropped, run) {
  const [rows, columns] = grid;
  const canvas = document.createElement("canvas");
  canvas.width = SIDE;
  canvas.height = Math.max(1, Math.round((SIDE * rows) / columns));
  const context = canvas.getContext("2d");
  drawPicture(context, picture, cropped);
  context.fillStyle = "rgba(20, 20, 20, 0.85)";
  const [width, height] = [canvas.width / columns, canvas.height / rows];
  let kept = 0;
  for (let token = 0; token < rows * columns; token += 1) {
    if (run.tokens.has(token)) kept += 1;
    else context.fillRect((token % columns) * width, Math.floor(token / columns) * height, width, height);
  }
  const layers = run.first === run.last ? `layer ${run.first}` : `layers ${run.first} to ${run.last}`;
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  caption.textContent = `${layers}: ${kept} of ${rows * columns}`;
  figure.append(canvas, caption);
  figure.dataset.layers = `${run.first}-${run.last}`;
  figure.dataset.read = String(kept);
  return figure;
}

async function showPatches(body, signal) {
  const options = { method: "POST", headers: headers(), body: JSON.stringify(body), signal };
  const view = await (await checked(await fetch("/v1/chat/patches", options))).json();
  const picture = await createImageBitmap(byId("file").files[0]);
  const figures = runs(view.read).map((run) => drawn(picture, view.grids[0], view.cropped, run));
  byId("patches").replaceChildren(...figures);
  byId("patches-note").textContent = `tier ${view.tier}; patches that no later token reads are dark`;
  byId("patches-section").hidden = false;
}

function clear() {
  for (const id of ["answer", "times", "error"]) byId(id).textContent = "";
  byId("patches-section").hidden = true;
}

async function ask(event) {
  event.preventDefault();
  clear();
  running = new AbortController();
  byId("ask").disabled = true;
  byId("stop").disabled = false;
  try {
    const body = await requestBody();
    await answer(body, running.signal);
    if (byId("file").files.length) await showPatches(body, running.signal);
  } catch (error) {
    if (error.name !== "AbortError") byId("error").textContent = error.message;
  } finally {
    byId("ask").disabled = false;
    byId("stop").disabled = true;
    document.body.dataset.asked = String(Number(document.body.dataset.asked ?? 0) + 1);
  }
}

async function begin() {
  byId("form").addEventListener("submit", ask);
  byId("stop").addEventListener("click", () => running?.abort());
  byId("tier").addEventListener("input", showTier);
  byId("limited").addEventListener("change", showTier);
  const load = () => loadModels().catch((error) => { byId("error").textContent = error.message; });
  byId("key").addEventListener("change", () => { byId("error").textContent = ""; load(); });
  const settings = await (await fetch("/page.json")).json();
  byId("key-field").hidden = !settings.needs_key;
  if (!settings.needs_key) await load();
}

begin();
