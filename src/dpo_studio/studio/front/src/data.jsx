// Pairs: the doctor's report, and the pairs side by side with their differences marked.
import { useEffect, useState } from "preact/hooks";
import { post, query, upload } from "./api.js";
import { words } from "./differences.js";
import { Empty, Field, Trouble, Turns, Waiting, link, useAction, useGet } from "./parts.jsx";

const PAGE = 20;

export function Data({ path = "" }) {
  const [typed, setTyped] = useState(path || "bundled:everyday");
  const open = (name) => {
    location.hash = `${link("data")}?path=${encodeURIComponent(name)}`;
  };
  const [send, sending, refused] = useAction(async (file) => open((await upload(file)).path));
  return (
    <>
      <form
        class="form two"
        onSubmit={(event) => {
          event.preventDefault();
          open(typed.trim());
        }}
      >
        <Field label="Pairs" help="a file or folder here, `bundled:everyday`, or a dataset's id on the Hub (which is downloaded)">
          <input value={typed} onInput={(event) => setTyped(event.target.value)} />
        </Field>
        <Field label="or a file of this browser's machine" help="up to 1 GiB, into uploads/">
          <input type="file" disabled={sending} onChange={(event) => event.target.files[0] && send(event.target.files[0])} />
        </Field>
        <p class="actions">
          <button class="first">Open</button>
        </p>
      </form>
      <Trouble error={refused} />
      {sending && <Waiting>Uploading</Waiting>}
      {path ? (
        <>
          <Report key={`report ${path}`} path={path} />
          <Pairs key={path} path={path} />
        </>
      ) : (
        <Empty title="No pairs are open">
          <p>
            A pair is a prompt with a chosen and a rejected answer. Open a file, or <code>bundled:everyday</code> to see the pairs
            that come with DPO Studio.
          </p>
        </Empty>
      )}
    </>
  );
}

const TONES = { stop: "worse", warning: "unclear", note: "none", fine: "better" };

function Report({ path }) {
  const { value, error, again } = useGet(`/api/data?${query({ path })}`);
  const running = value?.state === "running";
  useEffect(() => {
    if (!running) return undefined;
    const timer = setInterval(again, 1000);
    return () => clearInterval(timer);
  }, [running, again]);
  const report = value?.report;
  return (
    <section>
      <h2>The doctor's report</h2>
      <Trouble error={error ?? (value?.error ? { message: value.error, hint: value.hint } : null)} />
      {!value || running ? (
        <Waiting>Reading all pairs</Waiting>
      ) : (
        report && (
          <div class="findings">
            {report.findings.filter(({ level }) => level !== "fine").map((finding) => (
              <details key={finding.name} class={`panel finding ${TONES[finding.level] ?? "none"}`}>
                <summary>
                  {finding.title} <span class="chip">{finding.count.toLocaleString()}</span>
                </summary>
                {[finding.detail, finding.does, finding.todo].filter(Boolean).map((text) => (
                  <p key={text}>{text}</p>
                ))}
                {(finding.examples ?? []).map((example, at) => (
                  <p key={at} class="text muted" dir="auto">
                    row {example.row}: {example.text}
                  </p>
                ))}
              </details>
            ))}
            <p class="muted">
              Looked for and fine: {report.findings.filter(({ level }) => level === "fine").map(({ title }) => title).join(", ") || "nothing"}.
            </p>
          </div>
        )
      )}
      <p>
        <a href={`${link("new")}?source=${encodeURIComponent(path)}`}>Train on these pairs</a>
      </p>
    </section>
  );
}

function Pairs({ path }) {
  const [search, setSearch] = useState("");
  const [finding, setFinding] = useState("");
  const [offset, setOffset] = useState(0);
  const [aside, setAside] = useState([]);
  const [out, setOut] = useState("cleaned.jsonl");
  const [saved, setSaved] = useState(null);
  const { value, error, again } = useGet(`/api/data/pairs?${query({ path, offset, limit: PAGE, search, finding })}`);
  const [save, busy, refused] = useAction(async () => setSaved(await post("/api/data/save", { path, out, without: aside })));
  const indexing = value?.state === "indexing";
  useEffect(() => {
    if (!indexing) return undefined;
    const timer = setInterval(again, 500);
    return () => clearInterval(timer);
  }, [indexing, again]);
  const toggle = (row) => setAside((old) => (old.includes(row) ? old.filter((other) => other !== row) : [...old, row]));
  const first = (change) => (event) => {
    setOffset(0);
    change(event.target.value);
  };
  return (
    <section>
      <h2>Pairs</h2>
      <div class="form two">
        <Field label="Search">
          <input type="search" value={search} onInput={first(setSearch)} />
        </Field>
        <Field label="Show">
          <select value={finding} onChange={first(setFinding)}>
            <option value="">all rows</option>
            <option value="refused">rows that are no pair</option>
          </select>
        </Field>
      </div>
      <Trouble error={error} />
      {!value ? (
        !error && <Waiting />
      ) : indexing ? (
        <Waiting>Indexing, {value.rows} rows so far</Waiting>
      ) : (
        <>
          <Pager place="above" total={value.total} offset={offset} onOffset={setOffset} />
          {value.pairs.map((pair) => (
            <PairCard key={pair.row} pair={pair} isAside={aside.includes(pair.row)} onAside={() => toggle(pair.row)} />
          ))}
          {!value.pairs.length && <p class="muted">No row matches.</p>}
          <Pager place="below" total={value.total} offset={offset} onOffset={setOffset} />
        </>
      )}
      <form
        class="panel"
        onSubmit={(event) => {
          event.preventDefault();
          save();
        }}
      >
        <Field
          label={`Save as a new file, without ${aside.length} rows set aside`}
          help="The source is never changed."
          error={refused?.field === "out" ? refused : null}
        >
          <input value={out} onInput={(event) => setOut(event.target.value)} />
        </Field>
        <p class="actions">
          <button disabled={busy}>Save</button>
        </p>
        {refused?.field !== "out" && <Trouble error={refused} />}
        {saved && (
          <p role="status">
            {saved.pairs} pairs are in <code>{saved.out}</code>.{" "}
            <a href={`${link("new")}?source=${encodeURIComponent(saved.out)}`}>Train on them</a>
          </p>
        )}
      </form>
    </section>
  );
}

function Pager({ total, offset, onOffset, place }) {
  return (
    <p class="actions" role="navigation" aria-label={`pages of pairs, ${place}`}>
      <button type="button" disabled={offset === 0} onClick={() => onOffset(Math.max(0, offset - PAGE))}>
        Previous
      </button>
      <span>
        {total ? `${offset + 1} to ${Math.min(offset + PAGE, total)} of ${total.toLocaleString()}` : "0 rows"}
      </span>
      <button type="button" disabled={offset + PAGE >= total} onClick={() => onOffset(offset + PAGE)}>
        Next
      </button>
    </p>
  );
}

const textOf = (turns) => (turns ?? []).map((turn) => turn.content).join("\n\n");

function PairCard({ pair, isAside, onAside }) {
  if (pair.refused)
    return (
      <article class="panel">
        <b>Row {pair.row} is no pair.</b> <span class="text">{pair.refused}</span>
      </article>
    );
  const [chosen, rejected] = words(textOf(pair.chosen), textOf(pair.rejected));
  const side = (title, tone, parts) => (
    <div class={`answer ${tone}`}>
      <h3>{title}</h3>
      <p class="text" dir="auto">
        {parts.map(([text, differs], at) => (differs ? <mark key={at}>{text}</mark> : text))}
      </p>
    </div>
  );
  return (
    <article class={isAside ? "panel aside" : "panel"} aria-label={`row ${pair.row}`}>
      <p class="row">
        <span class="number">row {pair.row}</span>
        <label class="inline">
          <input type="checkbox" checked={isAside} onChange={onAside} /> set aside
        </label>
      </p>
      <div class="prompt">
        <Turns of={pair.prompt} />
      </div>
      <div class="compare">
        {side("Chosen", "tuned", chosen)}
        {side("Rejected", "base", rejected)}
      </div>
    </article>
  );
}
