// Blind comparison: two models, sides shuffled, a vote by key; the names are shown after the vote.
import { useEffect, useRef, useState } from "preact/hooks";
import { newId, post } from "./api.js";
import { Answer, Models, SAMPLING, Sampling, useAnswers } from "./answers.jsx";
import { Asking, Empty, Field, link, sends, useAction } from "./parts.jsx";

const CHOICES = [
  ["1", "left", "Left is better"],
  ["2", "right", "Right is better"],
  ["3", "tie", "Tie"],
  ["4", "both_bad", "Both are bad"],
];

const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

/** A prompt of a line: plain text, or a JSON row with `prompt` (text or turns). */
function promptOf(line) {
  if (!line.startsWith("{")) return line;
  try {
    const { prompt } = JSON.parse(line);
    return prompt ?? line;
  } catch {
    return line;
  }
}

export function Compare({ left = "bundled:smollm2-135m-instruct", right = "" }) {
  const [models, setModels] = useState([left, right]);
  const [sampling, setSampling] = useState(SAMPLING);
  const [prompts, setPrompts] = useState([]);
  const [set, setSet] = useState("");
  const [typed, setTyped] = useState("");
  const [round, setRound] = useState(null);
  const [count, setCount] = useState(0);
  const { answers, said, error, busy, ask, clear, stop } = useAnswers();
  const whole = round && !busy && answers.length === 2 && answers.every((answer) => answer.ended);

  const show = async (prompt, from) => {
    const seed = crypto.getRandomValues(new Uint32Array(1))[0] % 2 ** 31;
    const swapped = seed % 2 === 1;
    const sides = swapped ? { left: models[1], right: models[0] } : { left: models[0], right: models[1] };
    setRound({ id: newId(), prompt, from, seed, sides, choice: null, sampling: { ...sampling, seed } });
    const messages = typeof prompt === "string" ? [{ role: "user", content: prompt }] : prompt;
    await ask([sides.left, sides.right], messages, { ...sampling, seed });
  };
  const next = () => {
    if (prompts.length) {
      const [first, ...rest] = prompts;
      setPrompts(rest);
      show(first, set);
    } else {
      setRound(null);
      clear();
      field.current?.focus();
    }
  };
  const [vote, voting, refused] = useAction(async (choice) => {
    await post("/api/votes", {
      id: round.id,
      time: new Date().toISOString(),
      prompt: round.prompt,
      answers: { left: answers[0].text, right: answers[1].text },
      models: round.sides,
      sampling: round.sampling,
      shown_order_seed: round.seed,
      choice,
      voter: "",
      prompt_set: round.from,
    });
    setRound((old) => ({ ...old, choice }));
    setCount((old) => old + 1);
  });

  const field = useRef(null);
  const keys = useRef(null);
  keys.current = (event) => {
    if (event.target.matches("input, textarea, select") || event.ctrlKey || event.metaKey || event.altKey) return;
    const choice = CHOICES.find(([key]) => key === event.key);
    if (choice && whole && !round.choice && !voting) vote(choice[1]);
    else if ((event.key === "n" || event.key === "Enter") && round?.choice && !event.target.matches("button, a")) next();
  };
  useEffect(() => {
    const on = (event) => keys.current(event);
    addEventListener("keydown", on);
    return () => removeEventListener("keydown", on);
  }, []);

  const open = async (event) => {
    const file = event.target.files[0];
    if (!file) return;
    setPrompts(lines(await file.text()).map(promptOf));
    setSet(file.name);
  };
  const ready = models.every((name) => name.trim());
  const tone = (side) => (round.choice === side ? "tuned" : "none");
  return (
    <>
      <Models names={models} onNames={setModels} />
      <Sampling values={sampling} onValues={setSampling} />
      <form
        onSubmit={(event) => {
          event.preventDefault();
          show(typed.trim(), "");
          setTyped("");
          document.activeElement?.blur();
        }}
      >
        <div class="form two">
          <Field label="Prompt" help="Ctrl+Enter asks both">
            <textarea ref={field} rows="2" value={typed} onKeyDown={sends} onInput={(event) => setTyped(event.target.value)} />
          </Field>
          <Field label="or a file of prompts" help={prompts.length ? `${prompts.length} prompts wait` : "a prompt a line, or JSONL with `prompt`"}>
            <input type="file" accept=".txt,.jsonl,.json" onChange={open} />
          </Field>
        </div>
        <p class="actions">
          <button class="first" disabled={busy || !ready || !typed.trim()}>
            Ask both
          </button>
          <button type="button" disabled={busy || !ready || !prompts.length} onClick={next}>
            Next prompt of the file
          </button>
          {busy && (
            <button type="button" onClick={stop}>
              Stop
            </button>
          )}
          <span role="status" class="muted">
            {busy ? said || "The models answer …" : count ? `Votes cast here: ${count}` : ""}
          </span>
        </p>
      </form>
      <Asking error={error ?? refused} onYes={() => show(round.prompt, round.from)} />
      {round ? (
        <section aria-label="comparison">
          <p class="prompt" dir="auto">
            {typeof round.prompt === "string" ? round.prompt : round.prompt.map((turn) => turn.content).join("\n\n")}
          </p>
          <div class="compare">
            {["left", "right"].map((side, at) => (
              <Answer
                key={side}
                title={round.choice ? round.sides[side] : side === "left" ? "Left" : "Right"}
                tone={tone(side)}
                answer={answers[at] ?? { text: "" }}
                busy={busy}
              />
            ))}
          </div>
          <p class="votes">
            {CHOICES.map(([key, choice, label]) => (
              <button
                key={key}
                type="button"
                aria-keyshortcuts={key}
                aria-pressed={round.choice === choice}
                disabled={!whole || voting || round.choice !== null}
                onClick={() => vote(choice)}
              >
                <kbd>{key}</kbd> {label}
              </button>
            ))}
            {round.choice && (
              <button type="button" class="first" aria-keyshortcuts="n" onClick={next}>
                <kbd>n</kbd> Next
              </button>
            )}
          </p>
          <p role="status" class="muted">
            {round.choice && `Your vote is kept. Left was ${round.sides.left}, right was ${round.sides.right}.`}
          </p>
        </section>
      ) : (
        <Empty title="Nothing is compared yet">
          <p>
            Choose two models and a prompt. Sides are shuffled and names hidden until you have voted, by click or by the
            keys 1 to 4. <a href={link("votes")}>The votes</a> become a win rate, and pairs to train on.
          </p>
        </Empty>
      )}
    </>
  );
}
