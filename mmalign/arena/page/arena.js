// The page of the arena. A choice is kept in the browser until the server has confirmed that it is on the disk, and is sent
// again until then, so neither a lost answer nor a server that was killed loses or doubles it.
"use strict";

const at = (id) => document.getElementById(id);
const views = ["welcome", "stage", "message"];
const AHEAD = 2; // pairs held ready behind the one on show

let user = "";
let current = null; // {pair, since}
let queue = [];
let latest = null; // ticket of the last confirmed vote
let busy = false;
let asking = false;
let dismissed = false;
let making = false;
let turns = 0; // votes and undos so far: an older answer must not set the count back

function show(view) {
  for (const name of views) at(name).hidden = name !== view;
}

function say(text) {
  at("status").textContent = text;
}

function trouble(text) {
  at("trouble").textContent = text;
  at("trouble").hidden = !text;
}

const pause = (ms) => new Promise((done) => setTimeout(done, ms));

class Refusal extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

async function post(path, body) {
  const answer = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    cache: "no-store",
  });
  const said = await answer.json();
  if (!answer.ok) throw new Refusal(answer.status, said.error || "the server refused");
  return said;
}

// Ask until there is an answer; only a refusal that no repetition can change is handed on.
async function persist(path, body) {
  for (let wait = 250; ; wait = Math.min(2 * wait, 4000)) {
    try {
      const said = await post(path, body);
      trouble("");
      return said;
    } catch (error) {
      if (error instanceof Refusal && error.code < 500) {
        trouble("");
        throw error;
      }
      trouble(error instanceof Refusal ? `${error.message}. Trying again.` : "The arena does not answer. Your choice is kept here and sent again.");
      await pause(wait);
    }
  }
}

// ------------------------------------------------------------------ pairs

function preload(pair) {
  const images = ["left", "right"].map((side) => {
    const image = new Image();
    image.src = pair[side];
    return image.decode();
  });
  pair.ready = Promise.all(images);
  pair.ready.catch(() => {});
  return pair;
}

async function refill() {
  if (asking) return;
  asking = true;
  const whose = user;
  try {
    while (queue.length <= AHEAD && whose === user) {
      const holding = [...queue.map((pair) => pair.key), ...(current ? [current.pair.key] : [])];
      const turn = turns;
      const said = await persist("/api/next", { user: whose, holding });
      if (whose !== user) return;
      if (turn === turns) progress(said.progress);
      offer(said.offer);
      if (said.pair) {
        queue.push(preload(said.pair));
        if (!current) await advance();
      } else if (said.waiting) {
        if (!current) message("A moment", `The model is making pictures: ${said.made} of ${said.expected} prompts are ready.`);
        await pause(1000);
      } else {
        if (!current && !busy) finished();
        return;
      }
    }
  } catch (error) {
    message("This did not work", error.message);
  } finally {
    asking = false;
    if (user && whose !== user) refill();
  }
}

async function advance() {
  const pair = queue.shift();
  if (!pair) {
    current = null;
    return;
  }
  try {
    await pair.ready;
  } catch {
    say("A picture could not be shown and was passed over.");
    return advance();
  }
  put(pair);
}

function put(pair) {
  for (const side of ["left", "right"]) {
    const image = at(`${side}image`);
    image.onload = () => image.classList.toggle("small", image.naturalWidth < 200);
    image.src = pair[side];
    at(side).classList.remove("chosen");
  }
  at("prompt").textContent = pair.prompt;
  at("pair").classList.remove("busy");
  current = { pair, since: performance.now() };
  document.body.dataset.pair = pair.ticket;
  show("stage");
}

function message(title, text) {
  current = null;
  delete document.body.dataset.pair;
  at("messagetitle").textContent = title;
  at("messagetext").textContent = text;
  show("message");
}

function finished() {
  message("That is all", "You have seen every pair there is for you. Thank you.");
}

// ------------------------------------------------------------------ votes

async function choose(choice) {
  if (busy || !current || at("stage").hidden) return;
  busy = true;
  const { pair, since } = current;
  at("pair").classList.add("busy");
  if (choice === "left" || choice === "right") at(choice).classList.add("chosen");
  const vote = { user, ticket: pair.ticket, key: pair.key, choice, seconds: (performance.now() - since) / 1000 };
  remember(vote);
  await send(vote);
  busy = false;
  current = null;
  if (queue.length) await advance();
  refill();
}

async function send(vote) {
  turns += 1;
  try {
    const said = await persist("/api/vote", vote);
    latest = said.confirmed;
    progress(said.progress);
    offer(said.offer);
    document.body.dataset.confirmed = said.confirmed;
    say({ left: "First picture chosen.", right: "Second picture chosen.", tie: "Tie.", skip: "Skipped." }[vote.choice]);
  } catch (error) {
    trouble(`This choice was not taken: ${error.message}`);
  }
  remember(null);
}

async function undo() {
  if (busy || !latest) return;
  busy = true;
  turns += 1;
  try {
    const said = await persist("/api/undo", { user, ticket: latest });
    latest = null;
    progress(said.progress);
    if (said.pair) {
      if (current) queue.unshift(current.pair);
      const pair = preload(said.pair);
      try {
        await pair.ready;
        put(pair);
      } catch {
        await advance();
      }
    }
    say("The last choice was taken back.");
  } catch (error) {
    trouble(error.message);
  }
  busy = false;
  buttons();
}

function remember(vote) {
  try {
    if (vote) localStorage.setItem("arena.unsent", JSON.stringify(vote));
    else localStorage.removeItem("arena.unsent");
  } catch {
    // private windows may have no storage; the vote is then kept in memory alone
  }
}

function unsent() {
  try {
    return JSON.parse(localStorage.getItem("arena.unsent") || "null");
  } catch {
    return null;
  }
}

function buttons() {
  at("undo").disabled = at("undo2").disabled = !latest;
}

function progress(now) {
  const answered = now.choices + now.ties;
  const more = [now.ties && `${now.ties} tie${now.ties > 1 ? "s" : ""}`, now.skips && `${now.skips} skipped`].filter(Boolean);
  at("count").textContent = `${answered} of ${now.goal}${more.length ? ` (${more.join(", ")})` : ""}`;
  at("fill").style.width = `${Math.min(100, (100 * answered) / Math.max(1, now.goal))}%`;
  at("bar").setAttribute("aria-valuenow", String(Math.min(answered, now.goal)));
  at("bar").setAttribute("aria-valuemax", String(now.goal));
  buttons();
}

// ------------------------------------------------------------------ what is offered after some choices

function offer(words) {
  if (!words || dismissed) return;
  at("command").textContent = words.command;
  at("make").hidden = !words.here;
  at("offertext").textContent = words.here
    ? "There are enough choices to make pictures to your taste, here or with this command:"
    : "There are enough choices to make pictures to your taste. With a personalised run, this command does it:";
  at("offer").hidden = false;
}

async function make() {
  if (making) return;
  making = true;
  at("make").disabled = true;
  at("making").textContent = "Making pictures for you. You can go on choosing.";
  try {
    let said = await post("/api/personalise", { user });
    while (said.state === "working") {
      await pause(1000);
      said = await persist("/api/personalised", { user });
    }
    at("making").textContent = said.state === "done" ? "Made for you:" : `It did not work: ${said.reason || said.state}`;
    at("gallery").replaceChildren(
      ...said.pictures.map(({ prompt, url }) => {
        const figure = document.createElement("figure");
        const image = document.createElement("img");
        const caption = document.createElement("figcaption");
        image.src = url;
        image.alt = prompt;
        caption.textContent = prompt;
        figure.append(image, caption);
        return figure;
      }),
    );
  } catch (error) {
    at("making").textContent = error.message;
  }
  making = false;
  at("make").disabled = false;
}

async function copy() {
  const range = document.createRange();
  range.selectNodeContents(at("command"));
  getSelection().removeAllRanges();
  getSelection().addRange(range);
  try {
    await navigator.clipboard.writeText(at("command").textContent);
    say("Copied.");
    at("copy").textContent = "Copied";
  } catch {
    say("Selected; copy it with the keyboard.");
    at("copy").textContent = "Selected";
  }
  setTimeout(() => (at("copy").textContent = "Copy"), 1500);
}

// ------------------------------------------------------------------ beginning

async function begin(name) {
  const said = await persist("/api/next", { user: name, holding: [] });
  user = name;
  queue = [];
  current = null;
  latest = null;
  try {
    localStorage.setItem("arena.user", name);
  } catch {
    // as above
  }
  at("who").textContent = name;
  at("change").hidden = false;
  dismissed = false;
  at("offer").hidden = true;
  at("gallery").replaceChildren();
  at("making").textContent = "";
  progress(said.progress);
  const kept = unsent();
  if (kept && kept.user === name) {
    busy = true;
    await send(kept);
    busy = false;
  }
  refill();
}

function welcome(name) {
  user = "";
  queue = [];
  current = null;
  latest = null;
  at("who").textContent = "";
  at("count").textContent = "";
  at("fill").style.width = "0";
  at("change").hidden = true;
  at("offer").hidden = true;
  at("name").value = name || "";
  show("welcome");
  at("name").focus();
}

at("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  at("nameerror").textContent = "";
  try {
    await begin(at("name").value.trim());
  } catch (error) {
    at("nameerror").textContent = error.message;
  }
});
at("change").addEventListener("click", () => {
  if (!busy) welcome(user);
});
for (const side of ["left", "right"]) at(side).addEventListener("click", () => choose(side));
at("tie").addEventListener("click", () => choose("tie"));
at("skip").addEventListener("click", () => choose("skip"));
at("undo").addEventListener("click", undo);
at("undo2").addEventListener("click", undo);
at("later").addEventListener("click", () => {
  dismissed = true;
  at("offer").hidden = true;
});
at("details").addEventListener("click", () => {
  const open = at("offerbody").hidden;
  at("offerbody").hidden = !open;
  at("details").setAttribute("aria-expanded", String(open));
  at("details").textContent = open ? "Hide" : "Show how";
  if (open) at("offer").scrollIntoView({ block: "end" });
});
at("make").addEventListener("click", make);
at("copy").addEventListener("click", copy);

const KEYS = { 1: "left", ArrowLeft: "left", 2: "right", ArrowRight: "right", 0: "tie", s: "skip", S: "skip" };
document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || event.target === at("name")) return;
  if (KEYS[event.key]) {
    event.preventDefault();
    choose(KEYS[event.key]);
  } else if (event.key === "u" || event.key === "U") {
    event.preventDefault();
    undo();
  }
});

let touch = null;
at("pair").addEventListener("touchstart", (event) => {
  touch = event.touches.length === 1 ? { x: event.touches[0].clientX, y: event.touches[0].clientY } : null;
}, { passive: true });
at("pair").addEventListener("touchend", (event) => {
  if (!touch) return;
  const dx = event.changedTouches[0].clientX - touch.x;
  const dy = event.changedTouches[0].clientY - touch.y;
  touch = null;
  if (Math.abs(dx) > 70 && Math.abs(dx) > 2 * Math.abs(dy)) {
    event.preventDefault(); // no press of the picture under the finger
    choose("skip");
  }
});

let known = new URLSearchParams(location.search).get("user") || "";
try {
  known = known || localStorage.getItem("arena.user") || "";
} catch {
  // as above
}
if (known) begin(known).catch((error) => { welcome(known); at("nameerror").textContent = error.message; });
else welcome("");
