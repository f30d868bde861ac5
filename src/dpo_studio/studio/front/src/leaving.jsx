// Export of a run, the jobs, and the machine.
import { useState } from "preact/hooks";
import { newId, post } from "./api.js";
import { Command, Empty, Field, Job, State, Table, Trouble, Waiting, bytes, link, useAction, useGet, when } from "./parts.jsx";

const TARGETS = {
  adapter: "a LoRA adapter that PEFT and vLLM load on the base",
  merged: "the whole model, for any tool that loads safetensors",
  gptq: "a quantised model; it needs the extra gptq",
};

export function Export({ run = "" }) {
  const { value: runs, error } = useGet("/api/runs");
  const [chosen, setChosen] = useState(run);
  const [to, setTo] = useState("adapter");
  const [out, setOut] = useState("exported");
  const [job, setJob] = useState(null);
  const [start, busy, refused] = useAction(async () => {
    setJob((await post("/api/jobs", { id: newId(), verb: "export", run: chosen, out, to })).id);
  });
  if (!runs) return error ? <Trouble error={error} /> : <Waiting />;
  if (!runs.length)
    return (
      <Empty title="Nothing to export">
        <p>
          <a href={link("new")}>Start a run</a> first.
        </p>
      </Empty>
    );
  const wrong = (field) => (refused?.field === field ? refused : null);
  return (
    <>
      <form
        class="panel"
        onSubmit={(event) => {
          event.preventDefault();
          start();
        }}
      >
        <div class="form two">
          <Field label="Run" error={wrong("run")}>
            <select value={chosen} onChange={(event) => setChosen(event.target.value)}>
              <option value="">choose one</option>
              {runs.map((each) => (
                <option key={each.path} value={each.name}>
                  {each.name}
                </option>
              ))}
            </select>
          </Field>
          <Field label="As" help={TARGETS[to]}>
            <select value={to} onChange={(event) => setTo(event.target.value)}>
              {Object.keys(TARGETS).map((each) => (
                <option key={each}>{each}</option>
              ))}
            </select>
          </Field>
          <Field label="Into the folder" help="a new one, in the studio's folder" error={wrong("out")}>
            <input value={out} onInput={(event) => setOut(event.target.value)} />
          </Field>
        </div>
        <p class="actions">
          <button class="first" disabled={busy || !chosen || !out}>
            Export
          </button>
        </p>
        {!wrong("run") && !wrong("out") && <Trouble error={refused} />}
      </form>
      {job && <Job key={job} id={job} />}
    </>
  );
}

/** Models behind OpenAI-compatible servers, which Compare and Chat may ask. */
function Servers() {
  const { value: servers, again } = useGet("/api/endpoints");
  const [given, setGiven] = useState({ model: "", url: "", key_variable: "" });
  const [change, busy, refused] = useAction(async (path, body) => {
    await post(`/api/endpoints${path}`, body);
    await again();
  });
  const field = (key, label, help) => (
    <Field label={label} help={help} error={refused?.field === key ? refused : null}>
      <input
        value={given[key]}
        onInput={(event) => {
          const text = event.target.value.trim();
          setGiven((old) => ({ ...old, [key]: text }));
        }}
      />
    </Field>
  );
  return (
    <section>
      <h2>Servers</h2>
      <p class="muted">OpenAI-compatible servers (vLLM, llama.cpp, Ollama and others) for Compare and Chat. Others are not asked.</p>
      {servers?.map(({ name, key_variable, key_is_set }) => (
        <div key={name} class="panel row">
          <code class="number">{name}</code>
          {key_variable && (
            <span class={`chip ${key_is_set ? "better" : "worse"}`}>
              {key_variable} is {key_is_set ? "set" : "not set"}
            </span>
          )}
          <button type="button" class="small" disabled={busy} aria-label={`remove ${name}`} onClick={() => change("/remove", { name })}>
            Remove
          </button>
        </div>
      ))}
      <form
        class="panel"
        onSubmit={(event) => {
          event.preventDefault();
          change("", { ...given, key_variable: given.key_variable || null });
        }}
      >
        <div class="form">
          {field("model", "Model", "as the server names it")}
          {field("url", "Address", "such as http://localhost:8000/v1")}
          {field("key_variable", "Variable with its key", "of the studio's environment, ending in _API_KEY; optional. The key itself is kept nowhere.")}
        </div>
        <p class="actions">
          <button disabled={busy || !given.model || !given.url}>List this server</button>
        </p>
        {!["model", "url", "key_variable"].includes(refused?.field) && <Trouble error={refused} />}
      </form>
    </section>
  );
}

export function Machine() {
  const { value: machine, error } = useGet("/api/machine");
  const { value: session } = useGet("/api/session");
  const { value: jobs } = useGet("/api/jobs", 3000);
  if (!machine) return error ? <Trouble error={error} /> : <Waiting />;
  const rows = [
    ["Folder", session?.folder],
    ["Platform", machine.platform],
    ["Python", machine.python],
    ["Processor cores", machine.cpus],
    ["Memory", `${bytes(machine.memory.free)} free of ${bytes(machine.memory.total)}`],
    ["Disk", `${bytes(machine.disk.free)} free of ${bytes(machine.disk.total)}`],
    ["GPUs", machine.gpus.length ? machine.gpus.join("; ") : "none: training runs on the processor"],
    ["Cache", machine.cache],
    ...Object.entries(machine.versions).map(([name, version]) => [name, version ?? "not installed"]),
  ];
  return (
    <>
      <Table name="this machine">
          <caption>This machine</caption>
          <tbody>
            {rows.map(([name, value]) => (
              <tr key={name}>
                <th scope="row">{name}</th>
                <td>{value}</td>
              </tr>
            ))}
          </tbody>
        </Table>
      <Servers />
      <section>
        <h2>Jobs</h2>
        {jobs?.length ? (
          jobs.slice(0, 30).map((job) => (
            <div key={job.id} class="panel">
              <p class="about">
                <State of={job.state} /> <span>{job.verb}</span> <span class="muted">{job.started && when(1000 * job.started)}</span>
              </p>
              <Command>{job.command}</Command>
              <Trouble error={job.error ? { message: job.error, hint: job.hint } : null} />
            </div>
          ))
        ) : (
          <p class="muted">No command was started here yet.</p>
        )}
      </section>
    </>
  );
}
