// What leaves a run: an export with its check, a measured win rate, a quantised model. Each is a command, shown first.
import { useEffect, useState } from "preact/hooks";
import { newId, post, query } from "./api.js";
import { Asking, Command, Empty, Field, Job, Table, Trouble, Typed, Waiting, link, useAction, useGet } from "./parts.jsx";

const GPTQ = [
  ["bits", "Bits", "of a weight; 4 where left empty", [2, 3, 4, 8]],
  ["group_size", "Group size", "inputs that share a scale: auto is the largest of 128, 64, 32 that fits", ["auto", "128", "64", "32"]],
  ["rows", "Rows to calibrate on", "prompts with chosen answers; 128 where left empty"],
  ["desc_act", "Order by activation", "quantise the inputs that matter most first", "yes"],
];
const TARGETS = {
  adapter: "a LoRA adapter that PEFT and vLLM load on the base",
  merged: "the whole model, for any tool that loads safetensors; its check compares it with the run",
  gptq: "a quantised model; it needs the extra gptq, and its check compares it with the run",
  gguf: "a file for llama.cpp and Ollama; llama.cpp's own numbers are compared with the run's where xllamacpp is installed",
};
const VERBS = {
  export: {
    title: "Export",
    button: "Export",
    open: true,
    fields: [
      ["run", "Run", "", "run"],
      ["to", "As", (values) => TARGETS[values.to ?? "adapter"], Object.keys(TARGETS)],
      ["out", "Into the folder", "a new one, in the studio's folder"],
    ],
    more: (values) => [
      ...(values.to === "gptq" ? GPTQ : []),
      ...(values.to === "gguf" ? [["type", "Type", "of the matrices; f16 where left empty", ["f16", "bf16", "q8_0", "q4_k_m"]]] : []),
      ["dtype", "Precision of the check", "the run's own where left empty", ["float32", "bfloat16", "float16"]],
      ["force", "Keep it", "even where its check fails", "yes"],
    ],
    start: { to: "adapter", out: "exported" },
  },
  eval: {
    title: "Measure the win rate",
    button: "Measure",
    fields: [
      ["run", "Run", "", "run"],
      ["judge", "Judge", "everyday, length, implicit, reward:MODEL, or llm:MODEL@URL of a server that Settings lists"],
      ["against", "Against", "the run's own reference where left empty, or a model or run"],
    ],
    more: () => [
      ["temperatures", "Temperatures", "with commas; 0,0.25,0.5,0.75,1 where left empty"],
      ["prompts", "Held-out prompts", "at most; 80 where left empty"],
      ["samples", "Answers to a prompt", "at each temperature above 0; 1 where left empty"],
      ["max_new_tokens", "Longest answer", "in tokens; 128 where left empty"],
      ["seed", "Seed", "0 where left empty"],
      ["source", "Other pairs", "instead of the run's held-out ones"],
    ],
    start: {},
  },
  quantize: {
    title: "Quantise a model",
    button: "Quantise",
    fields: [
      ["model", "Model", "dense: a folder, a Hub id or the bundled one"],
      ["out", "Into the folder", "a new one, in the studio's folder"],
      ["calibration", "Pairs to calibrate on", "your own; a file, a folder or a Hub id"],
    ],
    more: () => [...GPTQ, ["max_length", "Longest prompt and answer", "in tokens; 1024 where left empty"]],
    start: { model: "bundled:smollm2-135m-instruct", out: "quantised" },
  },
};

function Value({ kind, value, onValue, runs, ...described }) {
  const options = kind === "run" ? runs.map((run) => run.name) : Array.isArray(kind) ? kind : null;
  if (kind === "yes")
    return <input {...described} type="checkbox" checked={Boolean(value)} onChange={(event) => onValue(event.target.checked || undefined)} />;
  if (!options) return <Typed {...described} value={value ?? ""} onText={(text) => onValue(text.trim() || undefined)} />;
  const read = (text) => (text === "" ? undefined : (options.find((option) => String(option) === text) ?? text));
  return (
    <select {...described} value={String(value ?? "")} onChange={(event) => onValue(read(event.target.value))}>
      <option value="">{kind === "run" ? "choose one" : "default"}</option>
      {options.map((option) => (
        <option key={option}>{option}</option>
      ))}
    </select>
  );
}

/** A form of one verb; what is wrong with a value stands beside it. */
function Verb({ verb, run, runs }) {
  const { title, button, open, fields, more, start } = VERBS[verb];
  const [values, setValues] = useState({ ...start, ...(run ? { run } : {}) });
  const [command, setCommand] = useState("");
  const [job, setJob] = useState(null);
  const [done, setDone] = useState(null);
  const asked = { verb, [verb]: values };
  const [check, , wrong] = useAction(async () => {
    setCommand("");
    setCommand((await post("/api/jobs/preview", asked)).command);
  });
  const [begin, busy, refused] = useAction(async () => {
    setDone(null);
    setJob((await post("/api/jobs", { ...asked, id: newId() })).id);
  });
  const complete = fields.slice(0, verb === "eval" ? 1 : 2).every(([key]) => values[key]);
  useEffect(() => {
    if (!complete) return undefined;
    const timer = setTimeout(check, 250);
    return () => clearTimeout(timer);
  }, [JSON.stringify(values)]);
  const all = [...fields, ...more(values)];
  const error = refused ?? (complete ? wrong : null);
  const field = error?.field?.split(".").pop();
  const one = ([key, label, help, kind]) => (
    <Field key={key} label={label} help={typeof help === "function" ? help(values) : help} error={field === key ? error : null}>
      <Value kind={kind} value={values[key]} runs={runs} onValue={(value) => setValues((old) => ({ ...old, [key]: value }))} />
    </Field>
  );
  return (
    <details class="panel verb" open={open}>
      <summary>
        <h2>{title}</h2>
      </summary>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          begin();
        }}
      >
        <div class="form">{fields.map(one)}</div>
        <details>
          <summary>Options</summary>
          <div class="form">{more(values).map(one)}</div>
        </details>
        {command && <Command>{command}</Command>}
        <p class="actions">
          <button class="first" disabled={busy || !complete || !command}>
            {button}
          </button>
        </p>
        {!all.some(([key]) => key === field) && <Asking error={error} onYes={check} />}
      </form>
      {job && <Job key={job} id={job} onEnd={(ended) => setDone(ended?.state === "finished" ? values.out : null)} />}
      {done && verb !== "eval" && <Told key={job} path={done} />}
    </details>
  );
}

const shown = (value) =>
  value === null ? "–" : typeof value === "number" ? String(Number(value.toPrecision(5))) : Array.isArray(value) ? value.map(shown).join(" to ") || "none" : String(value);
const CHECK = [
  ["compared_on", "compared on"],
  ["pairs", "pairs"],
  ["signs_kept", "share of the pairs that keep their preferred answer"],
  ["noise", "what the export changes of a reward margin (root mean square)"],
  ["margins_kept", "share of the margins beyond that which keep their sign"],
  ["accuracy_before", "accuracy of the run's own model"],
  ["accuracy", "accuracy of the export"],
  ["accuracy_ci95", "its 95 % interval"],
  ["accuracy_change_ci95", "the change, 95 % interval"],
  ["margin_before", "mean reward margin of the run's own model"],
  ["margin", "mean reward margin of the export"],
  ["nats_a_token", "change of an answer's log-prob, nats a token"],
  ["stop_rate_before", "answers that end by themselves, before"],
  ["stop_rate", "answers that end by themselves, after"],
  ["type", "type of the matrices"],
  ["misses", "what it misses"],
  ["rank", "rank"],
  ["base", "base"],
  ["perplexity_before", "perplexity before"],
  ["perplexity", "perplexity after"],
];

/** The check of an export, as its own file has it. */
function Told({ path }) {
  const { value, error } = useGet(`/api/exports?${query({ path })}`);
  if (!value) return error ? <Trouble error={error} /> : <Waiting />;
  const rows = CHECK.filter(([key]) => value[key] !== undefined);
  const parity = typeof value.parity === "object" ? value.parity : null;
  const check = (
    <Table name="check of the export">
      <caption>{value.to === "adapter" ? "The adapter, as it is: nothing was rounded" : "The export beside the run's own model"}</caption>
      <tbody>
        {rows.map(([key, label]) => (
          <tr key={key}>
            <th scope="row">{label}</th>
            <td>{shown(value[key])}</td>
          </tr>
        ))}
      </tbody>
    </Table>
  );
  if (value.to !== "gguf") return check;
  return (
    <>
      {check}
      {parity ? <Parity parity={parity} /> : <p>llama.cpp: not verified, because xllamacpp is not installed.</p>}
    </>
  );
}

/** The consumer's log-probs of held-out answers beside the run's. */
function Parity({ parity }) {
  return (
    <Table name="llama.cpp beside the run">
      <caption>
        {parity.consumer}: {shown(parity.nats_a_token)} nats a token from the run, {shown(parity.nats_a_token_from_base)} from the base;{" "}
        {parity.stops ? "stops" : "does not stop"} at the end of a turn
      </caption>
      <thead>
        <tr>
          <th scope="col">answer tokens</th>
          <th scope="col">run, nats</th>
          <th scope="col">{parity.consumer}, nats</th>
          <th scope="col">base, nats</th>
          <th scope="col">same chat</th>
          <th scope="col">same greedy tokens</th>
        </tr>
      </thead>
      <tbody>
        {parity.prompts.map((one, at) => (
          <tr key={at}>
            <td>{one.tokens}</td>
            <td>{shown(one.run)}</td>
            <td>{shown(one.consumer)}</td>
            <td>{shown(one.base)}</td>
            <td>{one.chat ?? "yes"}</td>
            <td>{one.greedy}</td>
          </tr>
        ))}
      </tbody>
    </Table>
  );
}

export function Export({ run = "" }) {
  const { value: runs, error } = useGet("/api/runs");
  if (!runs) return error ? <Trouble error={error} /> : <Waiting />;
  return (
    <>
      {runs.length ? (
        ["export", "eval"].map((verb) => <Verb key={verb} verb={verb} run={run} runs={runs} />)
      ) : (
        <Empty title="Nothing to export">
          <p>
            <a href={link("new")}>Start a run</a> first.
          </p>
        </Empty>
      )}
      <Verb verb="quantize" runs={runs} />
    </>
  );
}
