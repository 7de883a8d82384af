// What every page does: it asks the server twice a second for the session, shows it, and says what has happened.

export const $ = selector => document.querySelector(selector)
export const GONE = "The server does not answer. This page tries again twice a second."
const EVERY = 500 // milliseconds

const notice = $("#notice")
let known = $("[data-fact=id]").textContent // the session that this page is about
let working = null // what is said while a form of this page is under way; null where none is
let edition = 0 // answers to what was asked in an earlier edition are out of date
let told = "" // the sentence that stands there
let queue = Promise.resolve()

// The facts, wherever the page shows them: the strip, and the number beside the WebSocket.
export function show(facts) {
  for (const [name, value] of Object.entries(facts))
    for (const place of document.querySelectorAll(`[data-fact="${name}"]`)) {
      if (place.textContent === value) continue
      place.textContent = value
      place.classList.remove("changed")
      void place.offsetWidth // restarts the animation
      place.classList.add("changed")
    }
}

// Asks for the session now, after whoever asked before.
export function refresh() {
  return queue = queue.then(look)
}

async function look() {
  const asked = edition
  try {
    const answer = await fetch("/session", { signal: AbortSignal.timeout(5000) })
    if (!answer.ok) throw new Error(answer.statusText)
    const facts = await answer.json()
    if (asked === edition) take(facts)
  } catch {
    tell("gone", GONE, "Try now", refresh)
  }
}

function take(facts) {
  const before = known
  known = facts.id
  show(facts)
  if (working !== null)
    tell("working", working || facts.turn && `Waiting for its turn: ${facts.turn} in another tab comes first.`)
  else if (before !== "none" && known === "none")
    tell("ended", "This session has ended. It was ended elsewhere, or the server has forgotten it.", "Begin anew", reload)
  else if (before !== "none" && known !== before)
    tell("moved", "Another tab signed in or out, so this browser has another session now.", "Show it", reload)
  else if (notice.dataset.kind === "gone" || notice.dataset.kind === "ended" && known !== "none")
    tell("", "")
}

// A form is under way: `says` is shown, or, where that is empty, whom it waits for.
export function begin(says) {
  working = says
  tell("working", says)
}

// A form is done, with these facts, or with none where it failed.
export function done(facts) {
  working = null
  edition++
  tell("", "")
  if (!facts) return
  known = facts.id
  show(facts)
}

// Shows a sentence, and a button where something can be done about it. A focused button that goes leaves the
// focus to the title, because otherwise nothing would have it.
export function tell(kind, text, label, action) {
  if (notice.dataset.kind === kind && told === text) return
  told = text
  const focused = notice.contains(document.activeElement)
  notice.dataset.kind = kind
  notice.replaceChildren()
  if (text) {
    const line = document.createElement("p")
    line.textContent = text
    notice.append(line)
  }
  if (label) {
    const button = document.createElement("button")
    button.textContent = label
    button.onclick = action
    notice.append(button)
  }
  if (focused) (notice.querySelector("button") ?? $("#title")).focus()
}

// For those who listen instead of looking.
export function say(text) {
  $("#said").textContent = text
}

// Loads the page anew, with the focus on its title.
function reload() {
  sessionStorage.setItem("reloaded", "yes")
  location.reload()
}

async function watch() {
  for (;;) {
    await new Promise(done => setTimeout(done, EVERY))
    if (!document.hidden) await refresh()
  }
}

$(`nav a[href="${location.pathname}"]`)?.setAttribute("aria-current", "page")
if (sessionStorage.getItem("reloaded")) $("#title").focus()
sessionStorage.removeItem("reloaded")
document.addEventListener("visibilitychange", () => document.hidden || refresh())
watch()
