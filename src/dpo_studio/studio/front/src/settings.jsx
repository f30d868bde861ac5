// Settings: the servers that may be asked; the machine, and the jobs.
import { useState } from "preact/hooks";
import { post } from "./api.js";
import { Command, Field, State, Table, Trouble, Waiting, bytes, useAction, useGet, when } from "./parts.jsx";

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
      <p class="muted lead">OpenAI-compatible servers (vLLM, llama.cpp, Ollama and others) for Compare and Chat. Others are not asked.</p>
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
