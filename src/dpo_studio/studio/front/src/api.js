// What the pages ask the server. Every answer is JSON; a refusal is {error, hint, field}.

export class Refusal extends Error {
  constructor({ error, hint, field }, status) {
    super(error);
    this.hint = hint;
    this.field = field;
    this.status = status;
  }
}

const LOST = { error: "the studio does not answer", hint: "is `dpo studio` still running? This page tries again." };

async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Refusal(LOST, 0);
  }
  if (answer.ok) return answer;
  let said;
  try {
    said = await answer.json();
  } catch {
    said = { error: `the studio answered ${answer.status}` };
  }
  throw new Refusal(said, answer.status);
}

const asJson = (body, signal) => ({
  method: "POST",
  headers: { "content-type": "application/json" },
  body: JSON.stringify(body ?? {}),
  signal,
});

export const get = async (path) => (await ask(path)).json();
export const post = async (path, body) => (await ask(path, asJson(body))).json();

export const upload = async (file) =>
  (
    await ask(`/api/uploads/${encodeURIComponent(file.name)}`, {
      method: "PUT",
      headers: { "content-type": "application/octet-stream" },
      body: file,
    })
  ).json();

/** Server-sent events of a POST: EventSource can only GET. Calls `on(kind, data)` for each. */
export async function stream(path, body, on, signal) {
  const answer = await ask(path, asJson(body, signal));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const fields = Object.fromEntries(event.split("\n").map((line) => line.split(/: (.*)/s, 2)));
      if (fields.data) on(fields.event, JSON.parse(fields.data));
    }
  }
}

/** An id that the server keeps: the same request twice is done once. */
export const newId = () => crypto.randomUUID();

export const query = (values) =>
  new URLSearchParams(Object.entries(values).filter(([, value]) => value !== "" && value != null)).toString();
