// One run: its curves as it trains, what is wrong with it, its log, its recipe, and what can be done with it.
import { useEffect, useMemo, useState } from "preact/hooks";
import { get, newId, post, query } from "./api.js";
import { Curve } from "./curve.jsx";
import { Command, State, Trouble, Turns, Waiting, link, number, percent, useAction, useGet } from "./parts.jsx";

const FIGURES = [
  ["Loss", "of the optimizer steps, and on held-out pairs", ["loss"], "eval_loss"],
  ["Rewards", "beta x (log π − log π_ref), of the chosen and the rejected answers", ["rewards/chosen", "rewards/rejected"]],
  ["Reward margin", "reward of the chosen answer minus that of the rejected one", ["rewards/margins"], "eval_rewards/margins"],
  ["Accuracy", "share of pairs with a positive margin", ["rewards/accuracies"], "eval_rewards/accuracies"],
  ["Gradient norm", "before clipping", ["grad_norm"]],
  ["Learning rate", "", ["learning_rate"]],
];

/** The curve so far, and then as it grows: a lost connection is made again, from the last step that came. */
function useCurve(name) {
  const [curve, setCurve] = useState(null);
  const [live, setLive] = useState(true);
  const [error, setError] = useState(null);
  useEffect(() => {
    let events;
    let gone = false;
    let timer;
    const path = `/api/runs/${encodeURIComponent(name)}`;
    const begin = async () => {
      try {
        const { columns, held_out, last_step } = await get(`${path}/metrics?points=1000&spread=false`);
        if (gone) return;
        setCurve({ columns, held_out });
        setError(null);
        events = new EventSource(`${path}/events?after=${last_step}`);
        events.onopen = () => setLive(true);
        events.onerror = () => setLive(false);
        events.addEventListener("metrics", (event) => setCurve((old) => longer(old, JSON.parse(event.data))));
        events.addEventListener("reset", () => {
          events.close();
          begin();
        });
        events.addEventListener("gone", (event) => {
          events.close();
          setError(JSON.parse(event.data));
        });
      } catch (failed) {
        if (gone) return;
        setError(failed);
        timer = setTimeout(begin, 2000); // a run that was just started has no folder yet
      }
    };
    begin();
    return () => {
      gone = true;
      clearTimeout(timer);
      events?.close();
    };
  }, [name]);
  return [curve, live, error];
}

function longer(old, added) {
  const trained = added.step.map((step, at) => [step, at]).filter(([step]) => step > 0);
  const names = new Set([...Object.keys(old.columns), ...Object.keys(added)]);
  const before = (old.columns.step ?? []).length;
  const columns = {};
  for (const name of names)
    if (!name.startsWith("eval_"))
      columns[name] = [
        ...(old.columns[name] ?? Array(before).fill(null)),
        ...trained.map(([, at]) => added[name]?.[at] ?? null),
      ];
  const measured = added.step
    .map((step, at) => [step, at])
    .filter(([, at]) => Object.keys(added).some((name) => name.startsWith("eval_") && added[name][at] != null));
  const known = (old.held_out.step ?? []).length;
  const held_out = {};
  for (const name of new Set(["step", ...Object.keys(old.held_out), ...Object.keys(added)]))
    if (name === "step" || name.startsWith("eval_"))
      held_out[name] = [
        ...(old.held_out[name] ?? Array(known).fill(null)),
        ...measured.map(([, at]) => added[name]?.[at] ?? null),
      ];
  return { columns, held_out };
}

function Curves({ curve }) {
  const figures = useMemo(() => {
    const { columns, held_out } = curve;
    const x = [...new Set([...(columns.step ?? []), ...(held_out.step ?? [])])].sort((a, b) => a - b);
    const on = (table, name) => {
      const at = new Map((table.step ?? []).map((step, index) => [step, table[name]?.[index]]));
      return x.map((step) => at.get(step) ?? null);
    };
    return FIGURES.filter(([, , names]) => names.some((name) => columns[name])).map(([title, note, names, held]) => {
      const lines = names.map((name) => ({ label: name.split("/").pop(), values: on(columns, name) }));
      if (held && held_out[held]) lines.push({ label: "held-out", values: on(held_out, held) });
      return { title, note, x, lines };
    });
  }, [curve]);
  if (!figures.length) return <p class="muted">The first step has not ended yet.</p>;
  return (
    <div class="charts">
      {figures.map((figure) => (
        <Curve key={figure.title} {...figure} />
      ))}
    </div>
  );
}

export function Run({ name }) {
  const path = `/api/runs/${encodeURIComponent(name)}`;
  const { value: run, error, again } = useGet(path, 3000);
  const { value: samples } = useGet(`${path}/samples`, 10000);
  const [curve, live, lost] = useCurve(name);
  const [act, busy, refused] = useAction(async (verb, body) => {
    await post(`${path}/${verb}`, body);
    await again();
  });
  if (!run) return error ? <Trouble error={error} /> : <Waiting />;
  return (
    <>
      <p class="about">
        <State of={run.state} />
        <span>
          step {run.step}
          {run.steps ? ` of ${run.steps}` : ""}
        </span>
        <span>{run.base}</span>
        <span>{run.objective}</span>
      </p>
      {run.state === "running" && run.steps && (
        <progress value={run.step} max={run.steps} aria-label="steps">
          {percent(run.step / run.steps)}
        </progress>
      )}
      <p class="actions">
        {run.state === "running" ? (
          <button type="button" disabled={busy} onClick={() => act("stop")}>
            Stop with a checkpoint
          </button>
        ) : (
          run.state !== "finished" && (
            <button type="button" disabled={busy} onClick={() => act("continue", { id: newId() })}>
              Continue
            </button>
          )
        )}
        <a class="button" href={`${link("compare")}?${query({ left: run.base, right: name })}`}>
          Compare with its base
        </a>
        <a class="button" href={`${link("export")}?run=${encodeURIComponent(name)}`}>
          Export
        </a>
      </p>
      <Trouble error={refused ?? error ?? lost ?? (run.state === "failed" && run.error ? run : null)} />
      {!live && <p role="status">The connection was lost; the page reconnects and catches up.</p>}
      <dl class="cards">
        <Card title="Loss" value={number(run.loss)} note={run.objective === "dpo" ? "last step; DPO begins at ln 2 = 0.693" : "last step"} />
        <Card
          title="Accuracy"
          value={percent(run.accuracy)}
          note={run.held_out ? "of held-out pairs" : "of the step's training pairs"}
        />
        <Card title="Reward margin" value={number(run.margin)} note="reward of the chosen answer minus the rejected one's, last step" />
      </dl>
      <section>
        <h2>Curves</h2>
        {curve ? <Curves curve={curve} /> : <Waiting />}
      </section>
      <section>
        <h2>Run health</h2>
        {run.findings.length ? (
          run.findings.map((finding, at) => (
            <div key={at} class="panel finding">
              <h3>{finding.title}</h3>
              <p>
                From step {finding.first_step}
                {finding.last_step > finding.first_step && ` to ${finding.last_step}`}: {finding.saw}
              </p>
              <p>{finding.advice}</p>
            </div>
          ))
        ) : (
          <p class="muted">{run.step ? `Healthy: in ${run.step} steps no check found anything.` : "No step has ended yet."}</p>
        )}
      </section>
      {samples?.length > 0 && (
        <section>
          <h2>Answers as training goes</h2>
          {samples.slice(-12).map((sample, at) => (
            <div key={at} class="panel">
              <p class="muted">step {sample.step}</p>
              <div class="prompt">
                <Turns of={sample.prompt} />
              </div>
              <p class="text" dir="auto">
                {sample.answer}
              </p>
            </div>
          ))}
        </section>
      )}
      <section>
        <h2>Log and recipe</h2>
        {run.log && (
          <details open={run.state === "failed"}>
            <summary>Log</summary>
            <pre tabindex="0">{run.log}</pre>
          </details>
        )}
        <details>
          <summary>Recipe</summary>
          <pre tabindex="0">{run.recipe}</pre>
        </details>
        <Command>dpo train {run.path}/recipe.yaml</Command>
      </section>
    </>
  );
}

const Card = ({ title, value, note }) => (
  <div>
    <dt>{title}</dt>
    <dd class="value">{value}</dd>
    <dd class="note">{note}</dd>
  </div>
);
