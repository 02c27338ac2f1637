// Requests to the gateway that served this page. With a session cookie, or with a key that lives as long as the tab.

const KEY = "llmos-key";

export class Refused extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) || "",
  set: (text) => sessionStorage.setItem(KEY, text),
  forget: () => sessionStorage.removeItem(KEY),
};

function headers(body) {
  const found = body === undefined ? {} : { "content-type": "application/json" };
  if (key.get()) found.authorization = `Bearer ${key.get()}`;
  return found;
}

async function ask(path, body, signal) {
  const answer = await fetch(path, {
    method: body === undefined ? "GET" : "POST",
    headers: headers(body),
    body: body === undefined ? undefined : JSON.stringify(body),
    signal,
  });
  if (answer.ok) return answer;
  let text = `${answer.status} ${answer.statusText}`;
  try {
    text = (await answer.json()).error.message || text;
  } catch {
    // not one of our errors: the status has to do
  }
  throw new Refused(answer.status, text);
}

export const get = async (path) => (await ask(path)).json();
export const post = async (path, body = {}) => (await ask(path, body)).json();

// The `data:` of each event of a stream, parsed, until [DONE].
export async function* stream(path, body, signal) {
  const reader = (await ask(path, body, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value;
    const blocks = rest.split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data === "[DONE]") return;
      if (!data) continue;
      const event = JSON.parse(data);
      if (event.error) throw new Refused(500, event.error.message);
      yield event;
    }
  }
}
