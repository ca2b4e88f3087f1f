// Chat and Compare. Everything that a model or a person wrote goes into the page as textContent, never as HTML.

const $ = (id) => document.getElementById(id);

// Talking to the server

class ServerError extends Error {
  constructor(status, error) {
    super(error?.message ?? `the server answered ${status}`);
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
    throw new Error("the server does not answer: is it still running?");
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

function complain(error) {
  $("error").textContent = error ? error.message : "";
  $("error").hidden = !error;
}

// Calls fn and shows what goes wrong.
const guarded = (fn) => async (...args) => {
  complain(null);
  try {
    return await fn(...args);
  } catch (error) {
    complain(error);
  }
};

function message(role, text) {
  const item = document.createElement("li");
  item.className = role;
  item.textContent = text;
  return item;
}

// Enter in a text field sends its form.
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
let speaking = null; // what stops the answer that is coming

async function* pieces(response) {
  let rest = "";
  for await (const chunk of response.body.pipeThrough(new TextDecoderStream())) {
    const events = (rest + chunk).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const { error, choices } = JSON.parse(data);
      if (error) throw new ServerError(500, error);
      yield choices[0]?.delta.content ?? "";
    }
  }
}

// Asks for an answer, forgetting the oldest exchanges where the model cannot read so much.
async function ask(conversation, signal) {
  for (let forgotten = 0; ; forgotten += 2) {
    try {
      const response = await call("/v1/chat/completions", { model: $("model").value, messages: conversation, stream: true }, signal);
      if (forgotten) $("messages").lastChild.before(message("note", `The first ${forgotten} messages no longer fit and are forgotten.`));
      return response;
    } catch (error) {
      if (error.code !== "context_length_exceeded" || conversation.length < 3) throw error;
      conversation.splice(0, 2);
    }
  }
}

const say = guarded(async (text) => {
  const list = $("messages");
  const mine = conversation; // "New conversation" begins another, even while the answer is coming
  const asked = message("user", text);
  const answer = message("assistant writing", "");
  list.append(asked, answer);
  mine.push({ role: "user", content: text });
  speaking = new AbortController();
  busy(true);
  follow();
  try {
    for await (const piece of pieces(await ask(mine, speaking.signal))) {
      answer.textContent += piece;
      follow();
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      mine.pop();
      asked.remove();
      answer.remove();
      $("text").value = text;
      throw error;
    }
  } finally {
    busy(false);
    speaking = null;
  }
  mine.push({ role: "assistant", content: answer.textContent.trim() || "…" });
  answer.className = "assistant";
  answer.append(Object.assign(document.createElement("small"), { textContent: $("model").value }));
});

function busy(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
  $("messages").setAttribute("aria-busy", on);
  if (!on) $("text").focus();
}

const follow = () => window.scrollTo(0, document.body.scrollHeight);

$("say").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || speaking) return;
  $("text").value = "";
  say(text);
});
$("stop").addEventListener("click", () => speaking?.abort());
$("reset").addEventListener("click", () => {
  speaking?.abort();
  conversation = [];
  $("messages").replaceChildren();
  complain(null);
  $("text").focus();
});

// Compare

const KEYS = { a: 0, b: 1, t: "tie", x: "bad", 1: 0, 2: 1, 3: "tie", 4: "bad" };
let offer = null; // what is to be judged
let working = false;

const rater = () => $("rater").value.trim();

// One thing at a time: two quick keys make one choice.
const step = (fn) => guarded(async (...args) => {
  if (working || !rater()) return;
  working = true;
  $("pair").classList.add("busy");
  try {
    await fn(...args);
  } finally {
    working = false;
    $("pair").classList.remove("busy");
    $("waiting").textContent = offer || !rater() ? "" : $("waiting").textContent;
  }
});

function show(next) {
  offer = next;
  $("pair").hidden = !offer;
  if (!offer) return;
  $("prompt").replaceChildren(...offer.prompt.map(({ role, content }) => message(role, content)));
  document.querySelectorAll(".answer .said").forEach((said, i) => { said.textContent = offer.answers[i]; });
  $("question").focus({ preventScroll: true });
}

function report({ mine, done, of, rows, agreement }) {
  $("undo").disabled = mine === 0;
  $("count").textContent = of ? `${mine} by you, ${done} of ${of} in all` : `${rows} choices so far`;
  $("progress").hidden = of === 0;
  $("progress").max = of || 1;
  $("progress").value = done;
  const kappa = agreement.kappa === null ? "" : `, kappa ${agreement.kappa.toFixed(2)}`;
  $("agreement").textContent = agreement.comparisons
    ? `Raters agree in ${Math.round(100 * agreement.share)}% of choices (${agreement.comparisons} judged by several${kappa}).`
    : "";
}

async function fetchNext() {
  $("waiting").textContent = "Two answers are being written…";
  const next = await json("/api/next", { rater: rater() });
  show(next.offer);
  report(next.progress);
  if (!offer) $("waiting").textContent = next.progress.done < next.progress.of
    ? "You have judged all there is; the rest is for other raters."
    : "Nothing is left to judge. Thank you!";
}

const begin = step(fetchNext);

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
  report(back.progress);
});

const compareOwn = step(async (prompt) => {
  const before = offer;
  show(null);
  $("waiting").textContent = "Two answers are being written…";
  const next = await json("/api/next", { rater: rater(), prompt }).catch((error) => {
    $("waiting").textContent = "";
    show(before);
    $("own").value = prompt;
    $("own").focus();
    throw error;
  });
  show(next.offer);
  report(next.progress);
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
  $("waiting").textContent = "Give your name first: it stands beside your choices.";
  $("rater").focus();
}

$("rater").value = localStorage.getItem("rater") ?? "";
$("rater").addEventListener("change", () => {
  localStorage.setItem("rater", rater());
  show(null);
  if (rater()) begin();
  else needName();
});

// Both

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") speaking?.abort();
  const typing = event.target.matches("input, textarea, select");
  if (event.key === "Enter" && event.target === $("rater")) $("rater").blur();
  if (typing || $("compare").hidden || $("login").open || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const key = event.key.toLowerCase();
  if (key in KEYS) choose(KEYS[key]);
  else if (key === "u" && !$("undo").disabled) undo();
});

function view(name) {
  for (const each of ["chat", "compare"]) {
    $(each).hidden = each !== name;
    $(`show-${each}`).setAttribute("aria-pressed", each === name);
  }
  complain(null);
  if (location.hash !== `#${name}`) history.replaceState(null, "", `#${name}`);
  if (name === "chat") $("text").focus();
  else if (!rater()) needName();
  else if (!offer) begin();
}

$("show-chat").addEventListener("click", () => view("chat"));
$("show-compare").addEventListener("click", () => view("compare"));
sendOnEnter($("text"));
sendOnEnter($("own"));

guarded(async () => {
  const { models, progress } = await json(`/api/state?rater=${encodeURIComponent(rater())}`);
  $("model").replaceChildren(...models.map((name) => new Option(name, name)));
  report(progress);
  view(location.hash === "#compare" ? "compare" : "chat");
})();
