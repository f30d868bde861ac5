// The votes: win rates with their intervals, strengths, pairs to train on.
import { useState } from "preact/hooks";
import { post } from "./api.js";
import { Empty, Field, Table, Trouble, Waiting, link, percent, useAction, useGet } from "./parts.jsx";

/** A share with its interval, in numbers and as a line on a scale from 0 to 100 %, where 50 % is marked. */
function Share({ value, interval: [low, high] }) {
  const side = low > 0.5 ? "better" : high < 0.5 ? "worse" : "unclear";
  return (
    <td class={`share ${side}`}>
      <b>{percent(value)}</b>{" "}
      <span class="muted">
        {percent(low)} to {percent(high)}
      </span>
      <svg viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">
        <line x1="50" x2="50" y1="0" y2="8" class="middle" />
        <rect x={100 * low} width={Math.max(0.6, 100 * (high - low))} y="3" height="2" />
        <rect x={100 * value - 0.7} width="1.4" y="0.5" height="7" />
      </svg>
    </td>
  );
}

function WinRates({ rows, caption }) {
  return (
    <Table name={caption} class="rates">
      <caption>{caption}</caption>
      <thead>
        <tr>
          <th>Model</th>
          <th>against</th>
          <th>Win rate (95 %)</th>
          <th>at equal length (95 %)</th>
          <th class="n">won / tied / lost</th>
          <th class="n">prompts</th>
        </tr>
      </thead>
      <tbody>
        {rows.map((row) => (
          <tr key={row.models.join()}>
            <th scope="row">{row.models[0]}</th>
            <td class="name">{row.models[1]}</td>
            <Share value={row.win_rate} interval={row.win_rate_ci95} />
            <Share value={row.length_controlled} interval={row.length_controlled_ci95} />
            <td class="n">
              {row.wins} / {row.ties} / {row.losses}
            </td>
            <td class="n">{row.n_prompts}</td>
          </tr>
        ))}
      </tbody>
    </Table>
  );
}

const odds = (value) => (Math.abs(value) < 0.005 ? "0.00" : value.toFixed(2));

function Strengths({ of, caption }) {
  const rows = Object.entries(of).sort((a, b) => b[1].strength - a[1].strength);
  if (!rows.length) return null;
  return (
    <Table name={caption}>
      <caption>{caption}</caption>
      <thead>
        <tr>
          <th>Model</th>
          <th class="n">Strength (95 %)</th>
        </tr>
      </thead>
      <tbody>
        {rows.map(([name, { strength, ci95 }]) => (
          <tr key={name}>
            <th scope="row">{name}</th>
            <td class="n">
              <b>{odds(strength)}</b>{" "}
              <span class="muted">
                {odds(ci95[0])} to {odds(ci95[1])}
              </span>
            </td>
          </tr>
        ))}
      </tbody>
    </Table>
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
  const sets = Object.entries(summary.by_prompt_set);
  const titled = (name) => name || "Prompts that were typed";
  return (
    <>
      <p class="muted lead">
        {summary.votes} votes. A tie, or both bad, counts one half. Intervals are a percentile bootstrap over prompts; at
        equal length is a logistic regression on the difference in characters, read at none.
      </p>
      <WinRates rows={summary.pairs} caption="All prompts" />
      <Strengths of={summary.bradley_terry} caption="All prompts: Bradley-Terry strengths (log-odds around 0)" />
      {sets.length > 1 && (
        <section>
          <h2>By prompt set</h2>
          {sets.map(([name, { pairs, bradley_terry }]) => (
            <>
              <WinRates key={name} rows={pairs} caption={titled(name)} />
              <Strengths of={bradley_terry} caption={`${titled(name)}: Bradley-Terry strengths`} />
            </>
          ))}
        </section>
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
