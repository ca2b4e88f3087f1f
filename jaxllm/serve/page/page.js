// The views Chat and Compare. Text written by a model or a person enters the page as textContent, never as HTML.

const $ = (id) => document.getElementById(id);

// Requests

class ServerError extends Error {
  constructor(status, error) {
    super(error?.message ?? `the server responded with status ${status}`);
    this.status = status;
    this.code = error?.code;
  }
}

async function call(path, body, signal) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, { ...options, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not respond; check that it is still running");
  }
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  if (response.status === 401 && path !== "/api/login") {
    await login();
    return call(path, body, signal);
  }
  throw new ServerError(response.status, error);
}

const json = async (path, body) => (await call(path, body)).json();

let loggingIn = null;

function login() {
  loggingIn ??= new Promise((resolve) => {
    const dialog = $("login");
    dialog.oncancel = (event) => event.preventDefault();
    dialog.querySelector("form").onsubmit = async (event) => {
      event.preventDefault();
      try {
        await call("/api/login", { token: $("token").value });
        dialog.close();
        loggingIn = null;
        resolve();
      } catch (error) {
        $("login-error").textContent = error.message;
        $("token").select();
      }
    };
    dialog.showModal();
  });
  return loggingIn;
}

function showError(error) {
  $("error").textContent = error ? error.message : "";
  $("error").hidden = !error;
}

// Wraps fn so that its errors are shown on the page.
const guarded = (fn) => async (...args) => {
  showError(null);
  try {
    return await fn(...args);
  } catch (error) {
    showError(error);
  }
};

// An action leaves the focus where it is; where that element has gone, it moves to `next`.
function keepFocus(next) {
  const focused = document.activeElement;
  const lost = focused === document.body || focused.disabled || !focused.getClientRects().length;
  if (lost && next.getClientRects().length) next.focus({ preventScroll: true });
}

function message(role, text) {
  const item = document.createElement("li");
  item.className = role;
  item.dir = "auto";
  item.textContent = text;
  return item;
}

// Enter in a text field submits its form.
function sendOnEnter(field) {
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      field.form.requestSubmit();
    }
  });
}

// Chat

let conversation = [];
let generating = null; // the AbortController of the reply that is being generated

// The text of server-sent events, in pieces. With a reader, because Safari cannot iterate over a stream.
async function* pieces(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.slice("data: ".length);
        if (data === "[DONE]") return;
        const { error, choices } = JSON.parse(data);
        if (error) throw new ServerError(500, error);
        yield choices[0]?.delta.content ?? "";
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it is closed already where the request was aborted
  }
}

// Requests a reply; drops the oldest exchanges where the conversation does not fit the model's context.
async function requestReply(conversation, signal) {
  for (let dropped = 0; ; dropped += 2) {
    try {
      const response = await call("/v1/chat/completions", { model: $("model").value, messages: conversation, stream: true }, signal);
      if (dropped) $("messages").lastChild.before(message("note", `The first ${dropped} messages no longer fit and were dropped.`));
      return response;
    } catch (error) {
      if (error.code !== "context_length_exceeded" || conversation.length < 3) throw error;
      conversation.splice(0, 2);
    }
  }
}

const send = guarded(async (text) => {
  const mine = conversation; // "New conversation" replaces it, even while the reply is being generated
  const model = { textContent: $("model").value, title: $("model").title };
  const sent = message("user", text);
  const reply = message("assistant writing", "");
  $("messages").append(sent, reply);
  mine.push({ role: "user", content: text });
  generating = new AbortController();
  showBusy(true);
  scrollToEnd();
  try {
    for await (const piece of pieces(await requestReply(mine, generating.signal))) {
      reply.textContent += piece;
      scrollToEnd();
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      mine.pop();
      sent.remove();
      reply.remove();
      $("text").value = text;
      throw error;
    }
  } finally {
    showBusy(false);
    generating = null;
  }
  mine.push({ role: "assistant", content: reply.textContent.trim() || "…" });
  reply.className = "assistant";
  reply.append(Object.assign(document.createElement("small"), model));
});

function showBusy(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
  $("messages").setAttribute("aria-busy", on);
  keepFocus($("text"));
}

const scrollToEnd = () => window.scrollTo(0, document.body.scrollHeight);

$("compose").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || generating) return;
  $("text").value = "";
  send(text);
});
$("stop").addEventListener("click", () => generating?.abort());
$("reset").addEventListener("click", () => {
  generating?.abort();
  conversation = [];
  $("messages").replaceChildren();
  showError(null);
  $("text").focus();
});

// The path of the checkpoint, as a tooltip.
const showPath = () => { $("model").title = $("model").selectedOptions[0].title; };
$("model").addEventListener("change", showPath);

// Compare

const KEYS = { a: 0, b: 1, t: "tie", x: "bad", 1: 0, 2: 1, 3: "tie", 4: "bad" };
let offer = null; // the comparison that is shown
let working = false;

const rater = () => $("rater").value.trim();

// Ignores calls while another is in progress, so that two quick keys make one choice.
const step = (fn) => guarded(async (...args) => {
  if (working || !rater()) return;
  working = true;
  $("pair").classList.add("busy");
  try {
    await fn(...args);
  } finally {
    working = false;
    $("pair").classList.remove("busy");
    keepFocus($("question"));
    $("waiting").textContent = offer || !rater() ? "" : $("waiting").textContent;
  }
});

function show(next) {
  offer = next;
  $("pair").hidden = !offer;
  if (!offer) return;
  $("prompt").replaceChildren(...offer.prompt.map(({ role, content }) => message(role, content)));
  document.querySelectorAll(".answer .text").forEach((span, i) => { span.textContent = offer.answers[i]; });
}

function showProgress({ mine, done, of, rows, agreement }) {
  $("undo").disabled = mine === 0;
  $("count").textContent = of ? `${mine} by you, ${done} of ${of} in total` : `${rows} choices so far`;
  $("progress").hidden = of === 0;
  $("progress").max = of || 1;
  $("progress").value = done;
  const kappa = agreement.kappa === null ? "" : `, kappa ${agreement.kappa.toFixed(2)}`;
  $("agreement").textContent = agreement.comparisons
    ? `Raters agree in ${Math.round(100 * agreement.share)}% of choices (pairs with several raters: ${agreement.comparisons}${kappa}).`
    : "";
}

async function fetchNext() {
  $("waiting").textContent = "Generating two answers…";
  const next = await json("/api/next", { rater: rater() });
  show(next.offer);
  showProgress(next.progress);
  if (!offer) $("waiting").textContent = next.progress.done < next.progress.of
    ? "You have compared all pairs; the remaining choices are for other raters."
    : "All pairs are compared. Thank you!";
}

const showNext = step(fetchNext);

const choose = step(async (choice) => {
  if (!offer) return;
  try {
    await json("/api/choice", { rater: rater(), id: offer.id, choice });
  } catch (error) {
    if (error.status === 409) await fetchNext();
    throw error;
  }
  await fetchNext();
});

const undo = step(async () => {
  const back = await json("/api/undo", { rater: rater() });
  show(back.offer);
  showProgress(back.progress);
});

const compareOwn = step(async (prompt) => {
  const before = offer;
  show(null);
  $("waiting").textContent = "Generating two answers…";
  const next = await json("/api/next", { rater: rater(), prompt }).catch((error) => {
    $("waiting").textContent = "";
    show(before);
    $("own").value = prompt;
    $("own").focus();
    throw error;
  });
  show(next.offer);
  showProgress(next.progress);
  $("question").focus({ preventScroll: true }); // what the form was sent for; its field would take the keys
});

document.querySelectorAll("[data-choice]").forEach((button) => {
  const { choice } = button.dataset;
  button.addEventListener("click", () => choose(choice.length === 1 ? Number(choice) : choice));
});
$("undo").addEventListener("click", () => undo());
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const prompt = $("own").value.trim();
  if (!rater()) return needName();
  if (!prompt || working) return;
  $("own").value = "";
  compareOwn(prompt);
});

function needName() {
  $("waiting").textContent = "Enter your name first: it is recorded with your choices.";
  $("rater").focus();
}

// Asks back where a new name is near to a known one: two spellings would count as two raters.
const nameRater = guarded(async () => {
  localStorage.setItem("rater", rater());
  show(null);
  $("near").hidden = true;
  if (!rater()) return needName();
  const { near } = await json(`/api/state?rater=${encodeURIComponent(rater())}`);
  if (!near.length) return showNext();
  const button = (text, name) => {
    const made = Object.assign(document.createElement("button"), { type: "button", textContent: text, dir: "auto" });
    made.addEventListener("click", () => {
      $("near").hidden = true;
      $("rater").value = name;
      localStorage.setItem("rater", name);
      showNext();
    });
    return made;
  };
  $("waiting").textContent = "";
  $("near-names").replaceChildren(...near.map((name) => button(`I am ${name}`, name)), button(`No, I am new: ${rater()}`, rater()));
  $("near").hidden = false;
  $("near-names").firstChild.focus();
});

$("rater").value = localStorage.getItem("rater") ?? "";
$("rater").addEventListener("change", nameRater);

// Shortcuts of one letter can be switched off: speech input and screen readers trigger them by accident.
$("shortcuts").checked = localStorage.getItem("shortcuts") !== "off";
$("shortcuts").addEventListener("change", () => {
  localStorage.setItem("shortcuts", $("shortcuts").checked ? "on" : "off");
});

// Both

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") generating?.abort();
  const typing = event.target.matches("input:not([type=checkbox]), textarea, select");
  if (event.key === "Enter" && event.target === $("rater")) $("rater").blur();
  if (typing || !$("shortcuts").checked || $("compare").hidden || $("login").open || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const key = event.key.toLowerCase();
  if (key in KEYS) choose(KEYS[key]);
  else if (key === "u" && !$("undo").disabled) undo();
});

function view(name) {
  for (const each of ["chat", "compare"]) {
    $(each).hidden = each !== name;
    $(`show-${each}`).setAttribute("aria-pressed", each === name);
  }
  showError(null);
  if (location.hash !== `#${name}`) history.replaceState(null, "", `#${name}`);
  if (name === "chat") keepFocus($("text"));
  else if (!rater()) needName();
  else if (!offer && $("near").hidden) showNext();
}

$("show-chat").addEventListener("click", () => view("chat"));
$("show-compare").addEventListener("click", () => view("compare"));
sendOnEnter($("text"));
sendOnEnter($("own"));

guarded(async () => {
  const { progress } = await json(`/api/state?rater=${encodeURIComponent(rater())}`);
  const { data } = await json("/v1/models");
  $("model").replaceChildren(...data.map(({ id, path }) => Object.assign(new Option(id, id), { title: path })));
  showPath();
  showProgress(progress);
  view(location.hash === "#compare" ? "compare" : "chat");
})();
