// A conversation through /v1/chat/completions. It is kept in this tab only, and sent whole with each message: the prefix cache knows it.

import { get, stream } from "./api.js";
import { find, make } from "./dom.js";

let messages = [];
let running = null; // of the answer that comes in

export async function start() {
  const models = (await get("/v1/models")).data;
  find("model").replaceChildren(...models.map((model) => make("option", { value: model.id }, model.id)));
  clear();
}

export function listen() {
  find("say").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) running.abort();
    else say(find("prompt").value.trim());
  });
  find("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!running) find("say").requestSubmit();
  });
  find("anew").addEventListener("click", () => {
    if (running) running.abort();
    clear();
  });
}

function clear() {
  messages = [];
  find("talk").replaceChildren(make("article", { class: "empty" }, "What you say here is a sequence on the machine: watch it run beside, suspend it, kill it."));
}

function show(role, text) {
  const talk = find("talk");
  talk.querySelector(".empty")?.remove();
  const words = make("div", {}, text);
  const article = make("article", { class: role }, words);
  talk.append(article);
  talk.scrollTop = talk.scrollHeight;
  return [article, words];
}

async function say(text) {
  if (!text) return;
  find("prompt").value = "";
  messages.push({ role: "user", content: text });
  show("user", text);
  const [article, words] = show("assistant", "");
  const note = make("footer", {}, "…");
  article.append(note);
  const control = (running = new AbortController());
  find("send").textContent = "Stop";
  const began = performance.now();
  const conversation = messages;
  let answer = "", first = null, count = 0, reason = "";
  try {
    const body = {
      model: find("model").value, messages, stream: true, stream_options: { include_usage: true },
      temperature: Number(find("temperature").value), max_tokens: Number(find("most").value),
    };
    for await (const chunk of stream("/v1/chat/completions", body, control.signal)) {
      const choice = chunk.choices[0];
      if (choice?.delta?.content) {
        first ??= performance.now();
        answer += choice.delta.content;
        words.append(choice.delta.content);
        find("talk").scrollTop = find("talk").scrollHeight;
      }
      reason = choice?.finish_reason || reason;
      if (chunk.usage) count = chunk.usage.completion_tokens;
    }
    const took = performance.now() - (first ?? began);
    note.textContent = `${count} tokens, ${reason}` + (first && took > 0 ? `, first after ${Math.round(first - began)} ms, ${((count - 1) / took * 1000 || 0).toFixed(1)} tokens/s` : "");
  } catch (error) {
    note.textContent = error.name === "AbortError" ? "stopped" : error.message;
    note.className = error.name === "AbortError" ? "" : "failed";
  } finally {
    if (running === control) running = null;
    find("send").textContent = "Send";
    if (answer) conversation.push({ role: "assistant", content: answer });
    else conversation.pop(); // the next message would be two of the user in a row
  }
}
