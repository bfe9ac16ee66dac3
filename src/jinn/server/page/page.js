// A chat with the server that this page came from. All text is set as text, never as HTML.

const element = (id) => document.getElementById(id);
const conversation = [];
let running = null; // the AbortController of the answer that is being written

function headers() {
  const key = element("key").value.trim();
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function listModels() {
  const response = await fetch("/v1/models", { headers: headers() });
  const body = await response.json();
  if (!response.ok) throw new Error(body.error.message);
  element("model").replaceChildren(
    ...body.data.map((model) => {
      const option = document.createElement("option");
      option.textContent = option.value = model.id;
      return option;
    }),
  );
}

function show(role, text = "") {
  const article = document.createElement("article");
  article.className = role;
  article.textContent = text;
  element("messages").append(article);
  article.scrollIntoView({ block: "end" });
  return article;
}

// Where an answer is written: thoughts folded, then the text, then what it calls.
class Answer {
  constructor() {
    this.article = show("assistant");
    this.text = document.createElement("span");
    this.article.append(this.text);
    this.message = { role: "assistant", content: "" };
    this.calls = [];
  }

  add(delta) {
    const thought = delta.reasoning_content ?? delta.reasoning;
    if (thought) this.think(thought);
    if (delta.content) {
      this.message.content += delta.content;
      this.text.textContent = this.message.content;
    }
    for (const call of delta.tool_calls ?? []) this.call(call);
    const messages = element("messages");
    messages.scrollTop = messages.scrollHeight;
  }

  think(text) {
    if (!this.thoughts) {
      const details = document.createElement("details");
      const summary = document.createElement("summary");
      summary.textContent = "Thinking";
      this.thoughts = document.createElement("span");
      details.append(summary, this.thoughts);
      this.article.prepend(details);
      this.message.reasoning_content = "";
    }
    this.message.reasoning_content += text;
    this.thoughts.textContent = this.message.reasoning_content;
  }

  call({ index, id, function: { name, arguments: text } = {} }) {
    if (!this.calls[index]) {
      const shown = document.createElement("pre");
      shown.className = "call";
      this.article.append(shown);
      this.calls[index] = { shown, call: { id, type: "function", function: { name, arguments: "" } } };
      this.message.tool_calls = this.calls.map((entry) => entry.call);
    }
    const { shown, call } = this.calls[index];
    call.function.arguments += text ?? "";
    shown.textContent = `${call.function.name}(${call.function.arguments})`;
  }
}

// The data of each server-sent event.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
    }
  }
}

async function ask() {
  const temperature = element("temperature").value;
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: headers(),
    signal: running.signal,
    body: JSON.stringify({
      model: element("model").value || "default",
      messages: conversation,
      stream: true,
      stream_options: { include_usage: true },
      ...(temperature ? { temperature: Number(temperature) } : {}),
    }),
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  return response.body;
}

async function answer() {
  let reply = null;
  let firstAt = 0;
  let usage = null;
  try {
    for await (const event of events(await ask())) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      for (const { delta } of event.choices) {
        firstAt ||= performance.now();
        reply ??= new Answer();
        reply.add(delta);
      }
    }
    const seconds = (performance.now() - firstAt) / 1000;
    const speed = (usage.completion_tokens / seconds).toFixed(1);
    status(`${usage.prompt_tokens} + ${usage.completion_tokens} tokens, ${speed} tokens/s`);
  } catch (error) {
    if (error.name === "AbortError") status("Stopped.");
    else show("error", error.message);
  }
  if (reply) conversation.push(reply.message);
}

function status(text) {
  element("status").textContent = text;
}

async function send() {
  const text = element("prompt").value;
  if (running || !text.trim()) return;
  element("prompt").value = "";
  conversation.push({ role: "user", content: text });
  show("user", text);
  running = new AbortController();
  element("send").hidden = true;
  element("stop").hidden = false;
  status("…");
  await answer();
  running = null;
  element("send").hidden = false;
  element("stop").hidden = true;
}

function restart() {
  running?.abort();
  conversation.length = 0;
  element("messages").replaceChildren();
  status("");
}

element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
element("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
element("stop").addEventListener("click", () => running?.abort());
element("new").addEventListener("click", restart);
element("key").addEventListener("change", () => {
  sessionStorage.setItem("key", element("key").value);
  listModels().then(() => status(""), (error) => status(error.message));
});
element("key").value = sessionStorage.getItem("key") ?? "";
listModels().catch((error) => status(error.message));
