"use strict";
// Base and policy answer the same prompt; the base's answer is asked for once a prompt, the policy's at every change
// of the dial. Answers arrive as lines of JSON: {"text": piece}, then {"tokens": [...]}, or {"error": message}.

const element = (id) => document.getElementById(id);
const MOVED_MOST = { kl: 1.0, ratio: 2.0 }; // nats that give the darkest shade
let running = null;     // AbortController of the answers on their way
let baseKey = null;     // what the base's answer on the page belongs to
let tokens = [];        // views of the policy's answer

function capValue() {
  const exponent = Number(element("cap").value);
  return exponent >= 1 ? null : 10 ** exponent;
}

function thresholdValue() {
  const exponent = Number(element("threshold").value);
  return exponent <= -3 || element("interpolation").value === "weights" ? null : 10 ** exponent;
}

function question() {
  return {
    prompt: element("prompt").value,
    max_new_tokens: Number(element("length").value),
    temperature: Number(element("temperature").value),
    seed: Number(element("seed").value),
  };
}

function dial() {
  const weights = {};
  for (const slider of document.querySelectorAll("[data-adapter]")) weights[slider.dataset.adapter] = Number(slider.value);
  const strength = Number(element("strength").value), interpolation = element("interpolation").value;
  return {
    strength,
    interpolation,
    weights: Object.keys(weights).length ? weights : null,
    max_kl: strength === 0 ? null : capValue(),
    min_kl: strength === 0 ? null : thresholdValue(),
    decay: interpolation === "weights" ? 1 : Number(element("decay").value),
    off_inside: strength !== 0 && interpolation !== "weights" && element("inside").checked,
  };
}

async function stream(body, signal, onEvent) {
  const response = await fetch("api/answer", {
    method: "POST", signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  });
  if (!response.ok) throw new Error(await problem(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line) onEvent(JSON.parse(line));
  }
}

async function problem(response) {
  const body = await response.json().catch(() => ({}));
  return body.error || `the server answered ${response.status}`;
}

async function write(target, body, signal, onTokens) {
  target.textContent = "";
  target.setAttribute("aria-busy", "true"); // a screen reader waits for the whole answer
  try {
    await stream(body, signal, (event) => {
      if (event.error) throw new Error(event.error);
      if (event.text !== undefined) target.append(event.text);
      if (event.tokens) onTokens(event.tokens);
    });
  } finally {
    if (running?.signal === signal) target.setAttribute("aria-busy", "false");
  }
}

function clearPolicy() {
  tokens = [];
  for (const id of ["policy-answer", "policy-strength", "summary"]) element(id).textContent = "";
}

async function answer() {
  if (!element("form").reportValidity()) return;
  if (running) running.abort();
  const control = running = new AbortController();
  element("stop").disabled = false;
  say("Answering ...");
  hideTip();
  try {
    const asked = question(); // the fields may change while the base answers
    const key = JSON.stringify(asked);
    if (key !== baseKey) {
      baseKey = null;
      clearPolicy();
      await write(element("base-answer"), { ...asked, strength: 0 }, control.signal, () => {});
      baseKey = key;
    }
    const body = { ...asked, ...dial() };
    clearPolicy();
    element("policy-strength").textContent = `at strength ${body.strength.toFixed(2)}`;
    await write(element("policy-answer"), body, control.signal, (views) => { tokens = views; paint(); });
    say("Done.");
  } catch (error) {
    if (error.name !== "AbortError") say(error.message, true);
    else if (running === control) say("Stopped.");
  } finally {
    if (running === control) { running = null; element("stop").disabled = true; }
  }
}

function say(text, isError = false) {
  element("status").textContent = text;
  element("status").classList.toggle("error", isError);
}

// Indices of the tokens of each character or piece of text: a token's text is empty while its character is not complete.
function groups() {
  const all = [];
  let open = [];
  for (const [index, view] of tokens.entries()) {
    open.push(index);
    if (view.text) { all.push(open); open = []; }
  }
  return open.length ? [...all, open] : all;
}

function paint() {
  const target = element("policy-answer");
  target.textContent = "";
  for (const group of groups()) {
    const span = document.createElement("span");
    span.className = "token";
    span.tabIndex = target.childElementCount ? -1 : 0; // one stop of the Tab key for all of them, see `focusToken`
    span.textContent = tokens[group.at(-1)].text || "\ufffd";
    span.setAttribute("aria-describedby", "tip");
    target.append(span);
  }
  shadeAll();
  const mean = tokens.reduce((sum, view) => sum + view.kl, 0) / Math.max(1, tokens.length);
  const most = Math.max(0, ...tokens.map((view) => view.kl));
  element("summary").textContent = tokens.length
    ? `${tokens.length} tokens, mean KL ${mean.toFixed(3)}, largest ${most.toFixed(3)} nats` : "";
}

function shadeAll() {
  const measure = element("measure").value;
  legend(measure);
  const spans = document.querySelectorAll(".token");
  for (const [place, group] of (spans.length ? groups() : []).entries()) {
    const most = group.reduce((a, b) => (Math.abs(moved(tokens[b], measure)) > Math.abs(moved(tokens[a], measure)) ? b : a));
    spans[place].dataset.index = most; // whose facts the tip shows
    spans[place].style.backgroundColor = shade(tokens[most], measure);
  }
}

function moved(view, measure) {
  return measure === "ratio" ? view.logp - view.base_logp : view.kl;
}

function shade(view, measure) {
  return measure === "none" ? "transparent" : shadeOf(moved(view, measure) / MOVED_MOST[measure]);
}

// From -1, much less likely than under the base, to 1.
function shadeOf(share) {
  const colour = share >= 0 ? "230, 120, 20" : "30, 110, 200";
  return `rgba(${colour}, ${(0.75 * Math.min(1, Math.abs(share))).toFixed(3)})`;
}

function legend(measure) {
  element("legend").hidden = measure === "none";
  if (measure === "none") return;
  const most = MOVED_MOST[measure], least = measure === "ratio" ? -1 : 0;
  element("least").textContent = least ? `\u2264 \u2212${most}` : "0";
  element("most").textContent = `\u2265 ${most} nat${most === 1 ? "" : "s"}`;
  const stops = least ? [-1, -0.001, 0, 1] : [0, 1];
  element("scale").style.background = `linear-gradient(to right, ${stops.map(shadeOf).join(", ")})`;
}

// The arrow keys go from token to token, and Tab goes on to what comes after the answer.
function focusToken(event) {
  const spans = [...document.querySelectorAll(".token")], at = spans.indexOf(event.target);
  const target = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: spans.length - 1 }[event.key];
  if (at < 0 || target === undefined) return;
  event.preventDefault();
  spans[target]?.focus();
}

function enterToken(span) {
  for (const other of document.querySelectorAll(".token[tabindex='0']")) other.tabIndex = -1;
  span.tabIndex = 0; // Tab comes back to where it left
}

function showTip(span) {
  const view = tokens[Number(span.dataset.index)];
  if (!view) return;
  const tip = element("tip");
  tip.textContent = "";
  const facts = document.createElement("p");
  facts.style.margin = "0 0 .3rem";
  const ratio = view.logp - view.base_logp;
  facts.textContent = `KL ${view.kl.toFixed(3)} · log-ratio ${ratio >= 0 ? "+" : ""}${ratio.toFixed(2)}`
    + ` · strength ${view.strength.toFixed(2)}`;
  const table = document.createElement("table");
  const head = table.insertRow();
  for (const name of ["base", "policy"]) {
    const cell = document.createElement("th");
    cell.colSpan = 2; // a token and its probability
    cell.textContent = name;
    head.append(cell);
  }
  for (let row = 0; row < view.top.length; row += 1) {
    const line = table.insertRow();
    for (const [text, probability] of [view.base_top[row], view.top[row]]) {
      const code = document.createElement("code");
      code.textContent = JSON.stringify(text).slice(1, -1);
      line.insertCell().append(code);
      line.insertCell().textContent = `${(100 * probability).toFixed(1)}%`;
    }
  }
  tip.append(facts, table);
  tip.hidden = false;
  const box = span.getBoundingClientRect();
  const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 12);
  tip.style.left = `${Math.max(8, left) + scrollX}px`;
  const below = box.bottom + 6, above = box.top - 6 - tip.offsetHeight;
  const fits = below + tip.offsetHeight <= document.documentElement.clientHeight || above < 0;
  tip.style.top = `${(fits ? below : above) + scrollY}px`;
}

function hideTip() { element("tip").hidden = true; }

let waiting = null;
function dialMoved() {
  for (const id of ["decay", "threshold", "inside"]) element(id).disabled = element("interpolation").value === "weights";
  const cap = capValue(), threshold = thresholdValue(), decay = Number(element("decay").value);
  show(element("strength"), Number(element("strength").value).toFixed(2));
  show(element("cap"), cap === null ? "off" : cap.toPrecision(2));
  show(element("threshold"), threshold === null ? "off" : threshold.toPrecision(2));
  show(element("decay"), decay === 1 ? "off" : decay.toFixed(2));
  for (const slider of document.querySelectorAll("[data-adapter]")) show(slider, Number(slider.value).toFixed(2));
  clearTimeout(waiting);
  if (baseKey !== null) waiting = setTimeout(answer, 300);
}

function show(slider, text) {
  slider.parentElement.querySelector("output").textContent = text;
  slider.setAttribute("aria-valuetext", text); // the own value of cap and threshold is a logarithm
}

// Puts a slider at a value between its steps or beyond its ends, too.
function setSlider(slider, value) {
  if (Math.abs(20 * value - Math.round(20 * value)) > 1e-6) slider.step = 0.01;
  if (Math.abs(100 * value - Math.round(100 * value)) > 1e-6) slider.step = "any";
  // Whole numbers, from which 0 and 1 are reached in steps.
  if (value < slider.min) slider.min = Math.floor(value);
  if (value > slider.max) slider.max = Math.ceil(value);
  slider.value = value;
}

function addWeights(adapters, labels) {
  const names = Object.keys(adapters);
  if (names.length < 2) return;
  for (const name of names) {
    const row = document.createElement("div");
    row.className = "slider";
    const label = document.createElement("label");
    label.htmlFor = `weight-${name}`;
    label.textContent = labels[name] || name;
    const slider = document.createElement("input");
    Object.assign(slider, { id: `weight-${name}`, type: "range", min: -1, max: 2, step: 0.05 });
    setSlider(slider, adapters[name]);
    slider.dataset.adapter = name;
    slider.addEventListener("input", dialMoved);
    row.append(label, slider, document.createElement("output"));
    element("weights").append(row);
  }
}

element("form").addEventListener("submit", (event) => { event.preventDefault(); answer(); });
element("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); answer(); }
});
element("stop").addEventListener("click", () => { if (running) running.abort(); });
for (const id of ["strength", "cap", "threshold", "decay", "inside", "interpolation"]) element(id).addEventListener("input", dialMoved);
element("measure").addEventListener("change", shadeAll);
// A field that is not seen cannot say what is wrong with it.
element("sampling").addEventListener("invalid", () => { element("sampling").open = true; }, true);
for (const type of ["mouseover", "focusin"])
  element("policy-answer").addEventListener(type, (event) => { if (event.target.dataset.index) showTip(event.target); });
element("policy-answer").addEventListener("focusin", (event) => { if (event.target.dataset.index) enterToken(event.target); });
element("policy-answer").addEventListener("keydown", focusToken);
for (const type of ["mouseout", "focusout"]) element("policy-answer").addEventListener(type, hideTip);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });

fetch("api/policy").then((response) => response.json()).then((policy) => {
  element("policy-name").textContent = `${policy.title} on ${policy.base}`;
  element("length").max = policy.max_new_tokens;
  setSlider(element("strength"), policy.strength);
  legend(element("measure").value);
  addWeights(policy.adapters, policy.labels);
  element("interpolation").parentElement.hidden = policy.interpolations.length < 2;
  dialMoved();
});
