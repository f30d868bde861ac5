// The votes: win rates with their intervals, strengths, pairs to train on.
import { useState } from "preact/hooks";
import { post } from "./api.js";
import { Empty, Field, Trouble, Waiting, link, number, percent, useAction, useGet } from "./parts.jsx";

function WinRates({ rows, caption }) {
  return (
    <div class="table" role="region" aria-label={caption} tabindex="0">
      <table>
        <caption>{caption}</caption>
        <thead>
          <tr>
            <th>Model</th>
            <th>against</th>
            <th class="n">Win rate (95 %)</th>
            <th class="n">won / tied / lost</th>
          </tr>
        </thead>
        <tbody>
          {rows.map((row) => (
            <tr key={row.models.join()}>
              <th scope="row">{row.models[0]}</th>
              <td>{row.models[1]}</td>
              <td class="n">
                {percent(row.win_rate)}{" "}
                <span class="muted">
                  ({percent(row.win_rate_ci95[0])} to {percent(row.win_rate_ci95[1])}, {row.n_prompts} prompts)
                </span>
              </td>
              <td class="n">
                {row.wins} / {row.ties} / {row.losses}
              </td>
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

export function Votes() {
  const { value: summary, error } = useGet("/api/votes/summary", 5000);
  const [out, setOut] = useState("votes.jsonl");
  const [made, setMade] = useState(null);
  const [exported, busy, refused] = useAction(async () => setMade(await post("/api/votes/export", { out })));
  if (!summary) return error ? <Trouble error={error} /> : <Waiting />;
  if (!summary.votes)
    return (
      <Empty title="No votes yet">
        <p>
          <a href={link("compare")}>Compare two models blind</a>: each vote that prefers an answer is a pair to train on.
        </p>
      </Empty>
    );
  const sets = Object.entries(summary.by_prompt_set ?? {});
  const strengths = Object.entries(summary.bradley_terry ?? {}).sort((a, b) => b[1] - a[1]);
  return (
    <>
      <p class="muted lead">
        {summary.votes} votes. A tie, or both bad, counts one half; the interval is a percentile bootstrap over prompts.
      </p>
      <WinRates rows={summary.pairs} caption="All prompts" />
      {sets.length > 1 &&
        sets.map(([name, rows]) => <WinRates key={name} rows={rows} caption={name || "Prompts that were typed"} />)}
      {strengths.length > 0 && (
        <div class="table" role="region" aria-label="Bradley-Terry" tabindex="0">
          <table>
            <caption>Bradley-Terry strengths (log-odds around 0)</caption>
            <tbody>
              {strengths.map(([name, strength]) => (
                <tr key={name}>
                  <th scope="row">{name}</th>
                  <td class="n">{number(strength)}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      )}
      <section>
        <h2>Train on these votes</h2>
        <form
          class="panel"
          onSubmit={(event) => {
            event.preventDefault();
            exported();
          }}
        >
          <Field label="File" help="in the studio's folder; an existing one is not replaced" error={refused?.field === "out" ? refused : null}>
            <input value={out} onInput={(event) => setOut(event.target.value)} />
          </Field>
          <p class="actions">
            <button class="first" disabled={busy}>
              Export as pairs
            </button>
          </p>
          {refused?.field !== "out" && <Trouble error={refused} />}
          {made && (
            <p role="status">
              {made.pairs} pairs are in <code>{made.out}</code>; {made.tie} ties and {made.both_bad} where both were bad
              make none. <a href={`${link("new")}?source=${encodeURIComponent(made.out)}`}>Train on these votes</a>
            </p>
          )}
        </form>
      </section>
    </>
  );
}
