// Two models side by side in the same conversation.
import { useState } from "preact/hooks";
import { Answer, Models, SAMPLING, Sampling, useAnswers } from "./answers.jsx";
import { Asking, Empty, Field, sends } from "./parts.jsx";

export function Chat({ right = "" }) {
  const [models, setModels] = useState(["bundled:smollm2-135m-instruct", right]);
  const [sampling, setSampling] = useState(SAMPLING);
  const [system, setSystem] = useState("");
  const [typed, setTyped] = useState("");
  const [asked, setAsked] = useState([]);
  const { answers, said, error, busy, ask, stop } = useAnswers();
  const names = models.filter((name) => name.trim());
  const send = (event) => {
    event.preventDefault();
    const turns = [{ role: "user", content: typed.trim() }];
    if (system.trim()) turns.unshift({ role: "system", content: system.trim() });
    setAsked(turns);
    setTyped("");
    ask(names, turns, sampling);
  };
  return (
    <>
      <Models names={models} onNames={setModels} titles={["Base", "Tuned"]} />
      <Sampling values={sampling} onValues={setSampling} />
      <form onSubmit={send}>
        <div class="form two">
          <Field label="System prompt" help="optional">
            <textarea rows="2" value={system} onInput={(event) => setSystem(event.target.value)} />
          </Field>
          <Field label="Message" help="Ctrl+Enter sends">
            <textarea rows="2" value={typed} onKeyDown={sends} onInput={(event) => setTyped(event.target.value)} />
          </Field>
        </div>
        <p class="actions">
          <button class="first" disabled={busy || !names.length || !typed.trim()}>
            Send
          </button>
          {busy && (
            <button type="button" onClick={stop}>
              Stop
            </button>
          )}
          <span role="status" class="muted">
            {busy && (said || "The models answer …")}
          </span>
        </p>
      </form>
      <Asking error={error} onYes={() => ask(names, asked, sampling)} />
      {answers.length ? (
        <section aria-label="answers">
          <p class="prompt" dir="auto">
            {asked.at(-1)?.content}
          </p>
          <div class="compare">
            {answers.map((answer, at) => (
              <Answer key={at} title={names[at]} tone={at ? "tuned" : "base"} answer={answer} busy={busy} />
            ))}
          </div>
        </section>
      ) : (
        <Empty title="Nothing was asked yet">
          <p>Each message is answered by both models, with the same sampling settings. One name may stay empty.</p>
        </Empty>
      )}
    </>
  );
}
