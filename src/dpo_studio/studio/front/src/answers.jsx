// Two models answer the same prompt: chosen, asked, streamed. Compare and Chat are made of this.
import { useRef, useState } from "preact/hooks";
import { stream } from "./api.js";
import { Field, Typed, useGet } from "./parts.jsx";

export const BLANK = { text: "", ended: false, cut: false };

export function useAnswers() {
  const [answers, setAnswers] = useState([]);
  const [said, setSaid] = useState("");
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  const stopper = useRef(null);
  const change = (index, made) => setAnswers((old) => old.map((each, at) => (at === index ? made(each) : each)));
  const ask = async (models, messages, sampling) => {
    setAnswers(models.map(() => BLANK));
    setError(null);
    setBusy(true);
    stopper.current = new AbortController();
    let failed = false;
    const on = (kind, data) => {
      if (kind === "say") setSaid(data.say);
      else if (kind === "piece") change(data.index, (each) => ({ ...each, text: each.text + data.piece }));
      else if (kind === "end") change(data.index, (each) => ({ ...each, ended: true, cut: data.cut }));
      else if (kind === "error") {
        failed = true;
        setError({ message: data.error, hint: data.hint });
      }
    };
    try {
      await stream("/api/generate", { models, messages, sampling }, on, stopper.current.signal);
    } catch (refused) {
      failed = true;
      if (refused.name !== "AbortError") setError(refused);
    }
    setSaid("");
    setBusy(false);
    return !failed;
  };
  const clear = () => {
    setAnswers([]);
    setError(null);
  };
  return { answers, said, error, busy, ask, clear, stop: () => stopper.current?.abort() };
}

export function Models({ names, onNames, titles = ["One model", "The other"] }) {
  const { value: sources } = useGet("/api/compare/sources");
  const all = Object.values(sources ?? {}).flat();
  return (
    <div class="form two">
      <datalist id="models">
        {all.map((name) => (
          <option key={name} value={name} />
        ))}
      </datalist>
      {titles.map((title, at) => (
        <Field key={title} label={title} help={at ? null : "a run, a checkpoint, a model folder, a base, or a server that Settings lists"}>
          <Typed list="models" value={names[at]} onText={(text) => onNames(names.map((old, index) => (index === at ? text : old)))} />
        </Field>
      ))}
    </div>
  );
}

export function Sampling({ values, onValues }) {
  const field = (key, label, step) => (
    <Field label={label}>
      <Typed type="number" step={step} min="0" value={values[key]} onText={(text) => onValues({ ...values, [key]: Number(text) })} />
    </Field>
  );
  return (
    <details>
      <summary>Sampling</summary>
      <div class="form four">
        {field("temperature", "temperature", 0.1)}
        {field("top_p", "top-p", 0.05)}
        {field("max_new_tokens", "most new tokens", 1)}
        {field("seed", "seed", 1)}
      </div>
    </details>
  );
}

export const SAMPLING = { temperature: 0.7, top_p: 1, max_new_tokens: 256, seed: 0 };

export function Answer({ title, tone = "none", answer, busy }) {
  return (
    <article class={`answer ${tone}`}>
      <header class="who">
        <h3>{title}</h3>
        <span class="length">{answer.ended ? (answer.cut ? "cut off" : "ended by itself") : busy ? "writing" : "stopped"}</span>
      </header>
      <p class="text" dir="auto">
        {answer.text || (busy ? "…" : "(empty)")}
      </p>
    </article>
  );
}
