// The panel's one script. Pages are complete without it; it does what changes something, and what is live.
"use strict";

const API = "/api/v1/saes";
const LIVE = ["pending", "downloading", "converting", "uploading"];
const $ = (selector, within = document) => within.querySelector(selector);
const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];

// --- asking the server -------------------------------------------------------------------------------------------

class Failure extends Error {
  constructor(detail, remedy) { super(detail); this.remedy = remedy || ""; }
}

async function ask(method, path, body) {
  const headers = { "X-CSRF-Token": $('meta[name="csrf-token"]').content };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch {
    throw new Failure("The server cannot be reached", "see whether it runs, then try again");
  }
  if (answer.ok) return answer;
  if (answer.status === 401 && path !== "/api/v1/session") location.assign("/login");
  const told = await answer.json().catch(() => ({}));
  if (Array.isArray(told.detail)) {
    const lines = told.detail.map((one) => `${words(one.loc[one.loc.length - 1])}: ${one.msg}`);
    throw new Failure(lines.join(". "), "correct it and send it again");
  }
  throw new Failure(told.detail || `The server answered ${answer.status}`, told.remedy);
}

const words = (name) => String(name).replaceAll("_", " ");

// What a form's fields hold; empty ones are left out. The token's field is emptied at once: it is sent, not kept.
function taken(form) {
  const found = {};
  for (const field of $$("[data-field]", form)) {
    const name = field.dataset.field;
    if (field.disabled) continue;
    if (field.type === "checkbox") found[name] = field.checked;
    else if (field.type === "number") { if (field.value !== "") found[name] = Number(field.value); }
    else if (field.value.trim() !== "") found[name] = field.value.trim();
    if (field.type === "password") field.value = "";
  }
  return found;
}

// --- telling the person ------------------------------------------------------------------------------------------

function say(text) { $("#said").textContent = text; }

function showProblem(box, failure) {
  box.replaceChildren();
  box.hidden = !failure;
  if (!failure) return;
  const first = document.createElement("p"), strong = document.createElement("strong");
  strong.textContent = failure.message;
  first.append(strong);
  box.append(first);
  if (failure.remedy) {
    const second = document.createElement("p");
    second.textContent = `What to do: ${failure.remedy}.`;
    box.append(second);
  }
}

function banner(failure) {
  const box = $("#banner");
  box.hidden = false;
  $("p", box).textContent = failure.remedy ? `${failure.message}. What to do: ${failure.remedy}.` : failure.message;
}

function size(bytes) {
  let number = bytes, unit = "bytes";
  for (const next of ["kB", "MB", "GB", "TB"]) {
    if (number < 999.5) break;
    number /= 1000; unit = next;
  }
  return `${number.toFixed(unit === "bytes" || number >= 99.95 ? 0 : 1)}\u00a0${unit}`;
}

function progressText(data) {
  if (!data.bytes_total || data.status === "pending") return data.message;
  return `${data.message} \u00b7 ${size(data.bytes_done)} of ${size(data.bytes_total)}`;
}

// --- the page, made anew by the server -----------------------------------------------------------------------------

let refreshing = false, again = false;

// Ask for this page again, and put those parts in place that may have changed.
async function refresh() {
  if (refreshing) { again = true; return; }
  refreshing = true;
  const began = performance.now();
  try {
    const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
    if (answer.redirected) { location.assign(answer.url); return; }
    if (!answer.ok) { // deleted meanwhile, say; the page that tells it is a page
      if (answer.status === 404) location.assign("/");
      return;
    }
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const old of $$("[data-swap]")) {
      const made = fresh.getElementById(old.id);
      // what is the same stays: a click on a part that is replaced under the pointer would be lost
      if (made && !old.isEqualNode(made)) swap(old, document.adoptNode(made));
    }
    watchShown();
    for (const [, event] of lastEvents) if (event.at > began) apply(event);
  } catch {
    $("#connection").textContent = "The server cannot be reached";
  } finally {
    refreshing = false;
    if (again) { again = false; refresh(); }
  }
}

function swap(old, made) {
  const open = new Set($$("details[open] > summary", old).map((summary) => summary.textContent));
  const focused = old.contains(document.activeElement) ? document.activeElement : null;
  for (const summary of $$("details > summary", made)) if (open.has(summary.textContent)) summary.parentNode.open = true;
  old.replaceWith(made);
  if (!focused) return;
  const { act, saeId } = focused.dataset;
  const same = focused.id ? document.getElementById(focused.id)
    : act ? $$("[data-act]", made).find((one) => one.dataset.act === act && one.dataset.saeId === saeId)
    : $$("a", made).find((one) => one.href === focused.href);
  (same && same.getClientRects().length ? same : $("#main")).focus({ preventScroll: true });
}

// --- progress: over the WebSocket, or by asking again and again where there is none ---------------------------------

const wanted = new Set();
const lastEvents = new Map();
const known = new Map(); // channel -> the job that its last event was of
const uploads = new Map(); // job -> the dialog that waits for it
let socket = null, failures = 0, polling = 0;

function watch(channel) {
  if (wanted.has(channel)) return;
  wanted.add(channel);
  if (socket && socket.readyState === WebSocket.OPEN) send("subscribe", channel);
  else if (!socket) connect();
}

function watchShown() {
  const shown = new Set();
  for (const row of $$("[data-sae]")) for (const what of ["download", "upload"]) shown.add(`sae/${row.dataset.sae}/${what}`);
  for (const channel of [...wanted]) if (!shown.has(channel)) { wanted.delete(channel); send("unsubscribe", channel); }
  for (const channel of shown) watch(channel);
}

function send(action, channel) {
  if (socket && socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify({ action, channel }));
}

function connect() {
  socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/ws`);
  socket.onopen = () => {
    failures = 0;
    clearInterval(polling);
    polling = 0;
    $("#connection").textContent = "";
    for (const channel of wanted) send("subscribe", channel);
  };
  socket.onmessage = (message) => {
    const event = JSON.parse(message.data);
    if (event.data) receive(event);
  };
  socket.onclose = () => {
    socket = null;
    failures += 1;
    if (failures > 1) $("#connection").textContent = "Not connected; trying again";
    if (failures > 1 && !polling) polling = setInterval(poll, 2000);
    setTimeout(() => socket || connect(), Math.min(30000, 500 * 2 ** failures) * (0.75 + Math.random() / 2));
  };
}

async function poll() {
  let jobs;
  try {
    jobs = await (await ask("GET", `${API}/jobs?limit=200`)).json();
  } catch { return; }
  $("#connection").textContent = "";
  const seen = new Set();
  for (const job of jobs) { // the newest first
    const what = ["upload", "publish"].includes(job.kind) ? "upload" : "download", channel = `sae/${job.sae_id}/${what}`;
    if (seen.has(channel) || !wanted.has(channel)) continue;
    seen.add(channel);
    const stages = { queued: "pending", download: "downloading", convert: "converting", upload: "uploading" };
    const ends = { done: "ready", error: "error", cancelled: "error" };
    const { sae_id, progress, bytes_done, bytes_total, result } = job, status = ends[job.state] || stages[job.stage];
    const message = (status === "error" && job.error) || job.message;
    const data = { sae_id, progress, status, message, bytes_done, bytes_total, job_id: job.id, repo_url: result?.url };
    receive({ channel, data });
  }
  for (const channel of wanted) if (!known.has(channel)) known.set(channel, "none");
}

function receive(event) {
  const job = event.data.job_id ?? "none";
  // the first event is the state that the page was made with; another job's is not, even if it is over already
  event.news = known.has(event.channel) && known.get(event.channel) !== job;
  known.set(event.channel, job);
  event.at = performance.now();
  lastEvents.set(event.channel, event);
  apply(event);
}

// Show an event on the row of its SAE, and in the dialog that waits for it.
function apply({ channel, data, news }) {
  const waiting = data.job_id && uploads.get(data.job_id);
  if (waiting) showUpload(waiting, data);
  const row = $$("[data-sae]").find((one) => one.dataset.sae === data.sae_id);
  if (!row) return;
  const what = channel.split("/")[2], line = $(".work", row), shown = !line.hidden && line.dataset.channel === what;
  if (!LIVE.includes(data.status)) {
    if (!shown && !news) return;
    say(`${row.dataset.name}: ${data.status === "ready" ? (what === "upload" ? "uploaded" : "ready") : data.message}`);
    line.hidden = true;
    refresh();
    return;
  }
  if (!line.hidden && !shown && line.dataset.channel === "download") return;
  line.hidden = false;
  line.dataset.channel = what;
  $("progress", line).value = data.progress;
  $(".worktext", line).textContent = progressText(data);
  for (const badge of [$(".badge", row), $("#status .badge")]) if (badge) {
    badge.dataset.status = data.status;
    badge.textContent = data.status[0].toUpperCase() + data.status.slice(1);
  }
  const told = `${data.status} ${Math.floor(data.progress / 25)}`; // not each of many steps
  if (line.dataset.told !== told) say(`${row.dataset.name}: ${data.status}, ${Math.round(data.progress)}%`);
  line.dataset.told = told;
}

// --- dialogs -------------------------------------------------------------------------------------------------------

function openDialog(kind, { saeId, name, ...more }) {
  const dialog = document.getElementById(kind), form = $("form", dialog);
  form.reset();
  showProblem($(".problem", form), null);
  $('[data-field="sae_id"]', form).value = saeId;
  $('[data-show="name"]', form).textContent = name;
  if (kind === "upload") {
    const slug = name.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-+|-+$/g, "") || "sae";
    $('[data-field="filepath"]', form).value = `saes/${slug}`;
    showPart(form, "ask");
    chooseUpload(form, "upload");
  } else if (kind === "delete") {
    $('[data-show="size"]', form).textContent = more.size ? ` (${more.size})` : "";
    $('[data-part="files"]', form).hidden = !more.ready; // what is not whole keeps no files
  } else {
    $('[data-part="hub"]', form).hidden = !more.hub;
  }
  dialog.showModal();
}

function showPart(form, part) {
  for (const one of $$("[data-part]", form)) one.hidden = one.dataset.part !== part;
}

function showUpload(dialog, data) {
  const form = $("form", dialog);
  if (LIVE.includes(data.status)) {
    $("progress", form).value = data.progress;
    $(".worktext", form).textContent = progressText(data);
    return;
  }
  uploads.delete(data.job_id);
  if (data.status === "ready") {
    const link = $('[data-show="link"]', form);
    link.textContent = data.repo_url || "";
    if (/^https?:\/\//.test(data.repo_url || "")) link.href = data.repo_url;
    showPart(form, "done");
    link.focus();
  } else {
    showPart(form, "ask");
    showProblem($(".problem", form), new Failure(data.message, ""));
  }
}

// --- forms -----------------------------------------------------------------------------------------------------------

const forms = {
  async preview(form) {
    const asked = taken(form), answer = await ask("POST", "/add/preview", asked);
    const made = new DOMParser().parseFromString(await answer.text(), "text/html");
    $("#preview").replaceChildren(...made.body.childNodes);
    history.replaceState(null, "", `/add?repo_id=${encodeURIComponent(asked.repo_id)}`);
    $("#preview-title").focus();
  },

  async download(form) {
    const { name, ...asked } = taken(form), boxes = $$('[name="path"]:checked', form);
    if (!boxes.length) throw new Failure("No SAE is chosen", "tick one of the paths");
    for (const box of boxes) {
      const one = { repo_id: form.dataset.repo, filepath: box.value, ...asked };
      if (name && boxes.length === 1) one.name = name;
      await ask("POST", `${API}/download`, one);
      box.checked = false; // a second try does not start it again
    }
    location.assign("/");
  },

  async upload(form, dialog) {
    const { sae_id, filepath, ...asked } = taken(form), alone = $('[name="upload-as"]:checked', form)?.value !== "publish";
    const address = alone ? `${API}/upload` : `${API}/${sae_id}/publish`;
    const job = await (await ask("POST", address, alone ? { sae_id, filepath, ...asked } : asked)).json();
    const channel = `sae/${sae_id}/upload`, last = lastEvents.get(channel);
    uploads.set(job.job_id, dialog);
    showPart(form, "work");
    $("progress", form).value = 0;
    $(".worktext", form).textContent = "Queued";
    watch(channel);
    if (last && last.data.job_id === job.job_id) showUpload(dialog, last.data);
    refresh();
  },

  async delete(form, dialog) {
    const { sae_id } = taken(form), files = $('[name="delete-files"]:checked', form).value;
    const name = $('[data-show="name"]', form).textContent;
    await ask("DELETE", `${API}/${sae_id}?delete_files=${files}`);
    dialog.close();
    if (location.pathname !== "/") { location.assign("/"); return; }
    await refresh();
    say(`${name} was deleted`);
  },

  async retry(form, dialog) {
    const { sae_id, access_token } = taken(form);
    await ask("POST", `${API}/${sae_id}/retry`, access_token ? { access_token } : {});
    dialog.close();
    await refresh();
  },

  async "import-file"(form) {
    const made = await (await ask("POST", `${API}/import/file`, taken(form))).json();
    location.assign(`/saes/${made.id}`);
  },

  async "sign-in"(form) {
    await ask("POST", "/api/v1/session", taken(form));
    location.assign("/");
  },
};

document.addEventListener("submit", async (event) => {
  const form = event.target, todo = forms[form.dataset.form];
  if (form.dataset.auto !== undefined) {
    event.preventDefault();
    showFiltered(form);
  }
  if (!todo) return;
  event.preventDefault();
  const button = $('[type="submit"]', form), busy = $(".busy", form);
  const box = form.dataset.form === "preview" ? $("#preview-problem") : $(".problem", form);
  showProblem(box, null);
  button.disabled = true;
  if (busy) busy.textContent = "One moment";
  try {
    await todo(form, form.closest("dialog"));
  } catch (failure) {
    if (!(failure instanceof Failure)) throw failure;
    if (form.dataset.form === "preview") $("#preview").replaceChildren();
    showProblem(box, failure);
  } finally {
    button.disabled = false;
    if (busy) busy.textContent = "";
  }
});

// --- buttons ---------------------------------------------------------------------------------------------------------

const acts = {
  "open-upload": (button) => openDialog("upload", button.dataset),
  "open-delete": (button) => openDialog("delete", button.dataset),
  "open-retry": (button) => openDialog("retry", button.dataset),
  close: (button) => button.closest("dialog").close(),
  dismiss: () => { $("#banner").hidden = true; },
  async cancel(button) {
    await ask("POST", `${API}/${button.dataset.saeId}/cancel`);
    await refresh();
  },
  async "import-run"(button) {
    const made = await (await ask("POST", `${API}/import/training`, { training_id: button.dataset.trainingId })).json();
    await refresh();
    say(made.message);
  },
  async "sign-out"() {
    await ask("DELETE", "/api/v1/session");
    location.assign("/login");
  },
};

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-act]");
  if (!button) return;
  button.disabled = true;
  try {
    await acts[button.dataset.act](button);
  } catch (failure) {
    if (!(failure instanceof Failure)) throw failure;
    banner(failure);
  } finally {
    button.disabled = false;
  }
});

// --- filters ---------------------------------------------------------------------------------------------------------

let typing = 0;

function showFiltered(form) {
  clearTimeout(typing);
  const query = new URLSearchParams();
  for (const [name, value] of new FormData(form)) if (value) query.set(name, value);
  history.replaceState(null, "", query.size ? `${form.action}?${query}` : form.action);
  refresh().then(() => say($("#total")?.textContent ?? ""));
}

document.addEventListener("input", (event) => {
  const list = event.target.dataset.filter && $(event.target.dataset.filter);
  if (list) {
    const sought = event.target.value.trim().toLowerCase();
    for (const line of list.children) line.hidden = !line.textContent.toLowerCase().includes(sought);
  }
  const form = event.target.closest("[data-auto]");
  if (!form) return;
  clearTimeout(typing);
  typing = setTimeout(showFiltered, event.target.tagName === "SELECT" ? 0 : 300, form);
});

document.addEventListener("change", ({ target }) => {
  // one name for several SAEs would be none
  if (target.name === "path") $("#name").disabled = $$('[name="path"]:checked', target.form).length > 1;
  if (target.name === "upload-as") chooseUpload(target.form, target.value);
});

function chooseUpload(form, kind) {
  for (const part of $$("[data-only]", form)) {
    part.hidden = part.dataset.only !== kind;
    for (const field of $$("input", part)) field.disabled = part.hidden;
  }
}

document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "visible" && $("[data-swap]")) refresh();
});

watchShown();
document.documentElement.dataset.ready = "yes";
