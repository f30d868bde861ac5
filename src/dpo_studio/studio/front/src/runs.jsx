// The list of runs, and several of them in one figure.
import { useState } from "preact/hooks";
import { get } from "./api.js";
import { Curve } from "./curve.jsx";
import { Empty, State, Table, Trouble, Waiting, link, number, percent, useGet, when } from "./parts.jsx";

export function Runs() {
  const { value: runs, error } = useGet("/api/runs", 3000);
  const [chosen, setChosen] = useState([]);
  if (!runs) return error ? <Trouble error={error} /> : <Waiting />;
  if (!runs.length)
    return (
      <Empty title="No runs yet">
        <p>
          A run is a folder that a training makes. <a href={link("data")}>Look at your pairs</a> first, or{" "}
          <a href={link("new")}>start a run</a>. <code>dpo demo</code> makes one on the bundled model.
        </p>
      </Empty>
    );
  const toggle = (name) =>
    setChosen((old) => (old.includes(name) ? old.filter((other) => other !== name) : [...old, name]));
  return (
    <>
      <Trouble error={error} />
      <Table name="runs" class="runs">
          <thead>
            <tr>
              <th>
                <span class="hidden">compare</span>
              </th>
              <th>Run</th>
              <th>State</th>
              <th class="n">Step</th>
              <th class="n">Loss</th>
              <th class="n">Accuracy</th>
              <th class="n">Margin</th>
              <th>Base</th>
              <th>Started</th>
            </tr>
          </thead>
          <tbody>
            {runs.map((run) => (
              <tr key={run.path}>
                <td>
                  <input
                    type="checkbox"
                    aria-label={`compare ${run.name}`}
                    checked={chosen.includes(run.name)}
                    onChange={() => toggle(run.name)}
                  />
                </td>
                <th scope="row">
                  <a href={link("run", run.name)}>{run.name}</a>
                  {run.health.length > 0 && (
                    <span class="chip unclear" title={run.health.join("\n")}>
                      {run.health.length} finding{run.health.length > 1 && "s"}
                    </span>
                  )}
                </th>
                <td>
                  <State of={run.state} />
                </td>
                <td class="n">
                  {run.step}
                  {run.steps ? ` of ${run.steps}` : ""}
                </td>
                <td class="n">{number(run.loss)}</td>
                <td class="n" title={run.held_out ? "on held-out pairs" : "on training pairs"}>
                  {percent(run.accuracy)}
                  {run.accuracy != null && !run.held_out && <small class="muted"> train</small>}
                </td>
                <td class="n">{number(run.margin)}</td>
                <td class="wide">
                  {run.base} <small class="muted">{run.objective}</small>
                </td>
                <td class="date">{when(run.started)}</td>
              </tr>
            ))}
          </tbody>
        </Table>
      <Together names={chosen} />
    </>
  );
}

const FIGURES = { loss: "Loss", "rewards/margins": "Reward margin", "rewards/accuracies": "Accuracy" };

function Together({ names }) {
  const [figure, setFigure] = useState("loss");
  const [curves, setCurves] = useState({});
  const missing = names.filter((name) => !curves[name]);
  if (missing.length)
    Promise.all(missing.map(async (name) => [name, await get(`/api/runs/${name}/metrics?points=500&spread=false`)])).then((found) =>
      setCurves((old) => ({ ...old, ...Object.fromEntries(found) })),
    );
  if (names.length < 2)
    return names.length ? <p class="muted">Tick another run to see both in one figure.</p> : null;
  if (missing.length) return <Waiting />;
  const steps = [...new Set(names.flatMap((name) => curves[name].columns.step ?? []))].sort((a, b) => a - b);
  const lines = names.map((name) => {
    const { step = [], [figure]: values = [] } = curves[name].columns;
    const at = new Map(step.map((each, index) => [each, values[index]]));
    return { label: name, values: steps.map((each) => at.get(each) ?? null) };
  });
  return (
    <section>
      <h2>Compared</h2>
      <label class="inline">
        Figure{" "}
        <select value={figure} onChange={(event) => setFigure(event.target.value)}>
          {Object.entries(FIGURES).map(([key, title]) => (
            <option key={key} value={key}>
              {title}
            </option>
          ))}
        </select>
      </label>
      <Curve title={FIGURES[figure]} x={steps} lines={lines} />
    </section>
  );
}
