"use strict";
// The playground: asks the server that served it, and lets AnswerView draw what comes. It talks to no other host.

const field = (id) => document.getElementById(id);
let messages = []; // of the conversation so far; a new one has a list of its own
let model = null; // as /v1/models tells it
let running = null; // what stops the answer that comes now

/** A request to the server. Raises Error with the server's sentence. */
async function call(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (field("key").value) headers.Authorization = `Bearer ${field("key").value}`;
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) field("key-row").hidden = false;
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw new Error(body?.error?.message ?? `The server answered with status ${response.status}.`);
  }
  return response;
}

/** What the model is, and what it was exported with. */
async function loadModel() {
  if (model) return;
  [model] = (await (await call("v1/models")).json()).data;
  const own = model.fusionroute;
  field("model").textContent = model.id;
  field("fusion").value = own.fusion;
  field("lam").value = own.lam;
  for (const name of own.experts) field("expert").append(new Option(`always ${name}`, name));
  field("precision").append(...own.precisions.map((name) => new Option(name)));
  field("precision").disabled = own.precisions.length < 2; // the server was started with one
  field("facts").textContent = `A context of ${model.max_model_len} tokens.`;
  if (own.speculation === "off") {
    field("drafts").value = "off"; // as the server was started
    field("drafts").disabled = true;
  }
  showLam();
}

function showLam() {
  const additive = field("fusion").value === "additive";
  field("lam").disabled = additive;
  field("lam-value").textContent = additive ? "not used" : Number(field("lam").value).toFixed(2);
}

/** The body of a request, by the settings. */
function request(chat, text) {
  const own = { routing: true, candidates: Number(field("candidates").value), fusion: field("fusion").value };
  if (own.fusion === "weighted") own.lam = Number(field("lam").value);
  if (field("expert").value) own.expert = field("expert").value;
  own.precision = field("precision").value;
  own.drafts = field("drafts").value === "on";
  const body = { model: model.id, stream: true, fusionroute: own, temperature: Number(field("temperature").value) };
  body.top_p = Number(field("top_p").value);
  body[chat ? "max_completion_tokens" : "max_tokens"] = Number(field("max_tokens").value);
  if (field("seed").value !== "") body.seed = Number(field("seed").value);
  return chat ? { ...body, messages } : { ...body, prompt: text };
}

/** The objects of server-sent events. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

/** What the page of an answer shows above it. */
function history(text) {
  if (messages.length < 2) return text;
  return messages.map(({ role, content }) => `${role}: ${content}`).join("\n\n");
}

async function send() {
  const text = field("prompt").value;
  const chat = document.querySelector("input[name=mode]:checked").value === "chat";
  field("error").textContent = "";
  if (!text.trim() || running) return;
  if (!field("ask").reportValidity() || [...document.querySelectorAll("#settings input")].some((input) => !input.reportValidity())) return;
  const stopper = (running = new AbortController());
  field("send").disabled = true;
  field("stop").disabled = false;
  let turn = null;
  let answer = "";
  const conversation = messages;
  const sent = conversation.length;
  try {
    await loadModel();
    if (chat) conversation.push({ role: "user", content: text });
    const began = performance.now();
    const body = request(chat, text);
    const response = await call(chat ? "v1/chat/completions" : "v1/completions", { method: "POST", body: JSON.stringify(body), signal: stopper.signal });
    field("prompt").value = "";
    turn = new Turn(text, chat ? history(text) : text, body.fusionroute);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      for (const choice of event.choices) {
        answer += choice.delta?.content ?? choice.text ?? "";
        turn.take(choice, (performance.now() - began) / 1000);
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") field("error").textContent = error.message;
  }
  turn?.end();
  if (chat && turn) conversation.push({ role: "assistant", content: answer });
  else conversation.length = sent; // nothing was answered: the question stays in the field
  running = null;
  field("send").disabled = false;
  field("stop").disabled = true;
}

/** One question and its answer. */
class Turn {
  /** text: the question; history: what a shared page shows above the answer; own: the request's extension. */
  constructor(text, history, own) {
    this.history = history;
    this.figures = { finish_reason: "stopped" };
    this.times = [];
    this.share = element("button", "share", "Share as a page");
    this.share.type = "button";
    this.share.disabled = true;
    this.share.addEventListener("click", () => this.download());
    const root = element("div");
    field("turns").append(element("section", "turn", root, this.share));
    this.view = new AnswerView(root, field("details"));
    const { experts, router } = model.fusionroute;
    const facts = { fusion: own.fusion, ...(own.lam === undefined ? {} : { λ: own.lam }), precision: own.precision, speculation: own.drafts ? "auto" : "off" };
    this.view.begin({ model: model.id, prompt: text, experts, router, facts });
  }

  /** What an event says, so many seconds after the request. */
  take(choice, seconds) {
    const own = choice.fusionroute ?? {};
    for (const token of own.tokens ?? []) {
      this.times.push(seconds);
      this.view.add(token);
    }
    if (choice.finish_reason) {
      this.figures = { drafted: own.drafted, accepted: own.accepted, finish_reason: own.finish_reason ?? choice.finish_reason };
    }
    this.frame ??= requestAnimationFrame(() => this.draw());
  }

  /** Figures and the newest token, once a frame. */
  draw() {
    this.frame = null;
    this.view.measure(this.speed());
    if (!this.view.chosen && this.times.length && this.view.root.isConnected) this.view.select(this.times.length - 1, false, false);
  }

  speed() {
    const { times } = this;
    const seconds = times.at(-1) - times[0];
    return { first_seconds: times[0], tokens_per_second: seconds > 0 ? (times.length - 1) / seconds : undefined };
  }

  end() {
    if (this.frame) cancelAnimationFrame(this.frame);
    this.draw();
    this.view.finish({ ...this.speed(), ...this.figures });
    this.share.disabled = false;
  }

  /** Save the answer as one page of HTML. */
  async download() {
    const page = await (await call("playground/answer.html")).text();
    const json = JSON.stringify({ ...this.view.answer, prompt: this.history });
    const safe = json.replace(/[<>&'\u2028\u2029]/g, (sign) => `\\u${sign.charCodeAt(0).toString(16).padStart(4, "0")}`);
    const link = element("a");
    link.href = URL.createObjectURL(new Blob([page.replace('id="data">null<', () => `id="data">${safe}<`)], { type: "text/html" }));
    link.download = "answer.html";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }
}

field("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
field("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
field("stop").addEventListener("click", () => running?.abort());
field("clear").addEventListener("click", () => {
  running?.abort();
  messages = [];
  field("turns").replaceChildren();
  field("details").replaceChildren();
  field("prompt").focus();
});
field("lam").addEventListener("input", showLam);
field("fusion").addEventListener("change", showLam);
if (matchMedia("(max-width: 60rem)").matches) field("settings").open = false;
themeSwitch(document.querySelector(".theme"));
loadModel().catch((error) => (field("error").textContent = error.message));
