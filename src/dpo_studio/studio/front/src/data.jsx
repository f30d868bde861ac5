// Pairs: the doctor's report, and the pairs side by side with their differences marked.
import { useEffect, useState } from "preact/hooks";
import { post, query, upload } from "./api.js";
import { words } from "./differences.js";
import { Asking, Empty, Field, Trouble, Turns, Waiting, link, useAction, useGet } from "./parts.jsx";

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
        <Field label="Pairs" help="a file or folder here, `bundled:everyday`, or a dataset's id on the Hub">
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
          <Opened key={path} path={path} />
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

/** The report and the pairs; a finding's rows are shown by its button. Nothing is downloaded before somebody says yes. */
function Opened({ path }) {
  const [finding, setFinding] = useState("");
  const report = useGet(`/api/data?${query({ path })}`);
  if (report.error?.field === "download") return <Asking error={report.error} onYes={report.again} />;
  const show = (name) => {
    setFinding(name);
    document.getElementById("pairs")?.scrollIntoView();
  };
  return (
    <>
      <Report path={path} asked={report} onShow={show} />
      <Pairs path={path} finding={finding} onFinding={setFinding} findings={report.value?.report?.findings ?? []} />
    </>
  );
}

const TONES = { stop: "worse", warning: "unclear", note: "none", fine: "better" };

function Report({ path, asked: { value, error, again }, onShow }) {
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
                {(finding.has_rows || finding.name === "refused-rows") && (
                  <p class="actions">
                    <button type="button" onClick={() => onShow(nameOf(finding))}>
                      Show its {finding.count.toLocaleString()} rows
                    </button>
                  </p>
                )}
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

/** As `pairs?finding=` has it. */
const nameOf = (finding) => (finding.name === "refused-rows" ? "refused" : finding.name);

function Pairs({ path, finding, onFinding, findings }) {
  const [search, setSearch] = useState("");
  const [offset, setOffset] = useState(0);
  const [aside, setAside] = useState([]);
  const [edited, setEdited] = useState({});
  const [out, setOut] = useState("cleaned.jsonl");
  const [saved, setSaved] = useState(null);
  const { value, error, again } = useGet(`/api/data/pairs?${query({ path, offset, limit: PAGE, search, finding })}`);
  const [save, busy, refused] = useAction(async () => setSaved(await post("/api/data/save", { path, out, without: aside, edited })));
  const indexing = value?.state === "indexing";
  useEffect(() => {
    if (!indexing) return undefined;
    const timer = setInterval(again, 500);
    return () => clearInterval(timer);
  }, [indexing, again]);
  const toggle = (row) => setAside((old) => (old.includes(row) ? old.filter((other) => other !== row) : [...old, row]));
  useEffect(() => setOffset(0), [finding]);
  const first = (change) => (event) => {
    setOffset(0);
    change(event.target.value);
  };
  return (
    <section>
      <h2 id="pairs">Pairs</h2>
      <div class="form two">
        <Field label="Search">
          <input type="search" value={search} onInput={first(setSearch)} />
        </Field>
        <Field label="Show">
          <select value={finding} onChange={first(onFinding)}>
            <option value="">all rows</option>
            <option value="refused">rows that are no pair</option>
            {findings
              .filter((each) => each.has_rows)
              .map((each) => (
                <option key={each.name} value={each.name}>
                  {each.title} ({each.count.toLocaleString()})
                </option>
              ))}
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
            <PairCard
              key={pair.row}
              pair={edited[pair.row] ? { ...pair, ...edited[pair.row] } : pair}
              isAside={aside.includes(pair.row)}
              isMended={Boolean(edited[pair.row])}
              onAside={() => toggle(pair.row)}
              onMended={(mended) => setEdited((old) => ({ ...old, [pair.row]: mended }))}
            />
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
          label={`Save as a new file, without ${aside.length} rows set aside and with ${Object.keys(edited).length} mended`}
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

/** The last turn of each part in other words. */
function Mend({ pair, onMended }) {
  const sides = ["prompt", "chosen", "rejected"];
  const [texts, setTexts] = useState(Object.fromEntries(sides.map((side) => [side, pair[side].at(-1).content])));
  const mended = () =>
    Object.fromEntries(
      sides.map((side) => [side, pair[side].map((turn, at) => ({ role: turn.role, content: at === pair[side].length - 1 ? texts[side] : turn.content }))]),
    );
  return (
    <form
      onSubmit={(event) => {
        event.preventDefault();
        onMended(mended());
      }}
    >
      {sides.map((side) => (
        <Field key={side} label={`${side} of row ${pair.row}`}>
          <textarea
            rows="3"
            value={texts[side]}
            onInput={(event) => {
              const text = event.target.value;
              setTexts((old) => ({ ...old, [side]: text }));
            }}
          />
        </Field>
      ))}
      <p class="actions">
        <button disabled={sides.some((side) => !texts[side].trim())}>Keep these words</button>
      </p>
    </form>
  );
}

function PairCard({ pair, isAside, isMended, onAside, onMended }) {
  const [mending, setMending] = useState(false);
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
        <span class="number">
          row {pair.row}
          {isMended && " · mended"}
        </span>
        <button type="button" class="small" aria-expanded={mending} aria-label={`mend row ${pair.row}`} onClick={() => setMending(!mending)}>
          Mend
        </button>
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
      {mending && (
        <Mend
          pair={pair}
          onMended={(mended) => {
            setMending(false);
            onMended(mended);
          }}
        />
      )}
    </article>
  );
}
