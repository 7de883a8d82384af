// Forms without a new page: the answer's content takes the place of this page's, and the focus stays where it was.
import { $, GONE, begin, done, refresh, say, tell } from "/web/page.js"

let busy = false

// Shows the content of a whole page that the server sent.
function swap(page) {
  $("main").replaceChildren(...page.querySelector("main").childNodes)
  document.title = page.title
}

function factsOf(page) {
  return Object.fromEntries([...page.querySelectorAll("dd")].map(place => [place.dataset.fact, place.textContent]))
}

async function send(form, button) {
  const body = new URLSearchParams(new FormData(form, button))
  const answer = await fetch(form.action, { method: "POST", body })
  const text = await answer.text()
  if (!answer.headers.get("content-type").startsWith("text/html")) throw new Error(text)
  const page = new DOMParser().parseFromString(text, "text/html")
  const focused = document.activeElement.id || button.id // a click focuses no button in Safari
  swap(page)
  done(factsOf(page))
  const invalid = $("[aria-invalid=true]")
  const after = invalid ?? document.getElementById(focused) ?? document.getElementById(form.dataset.then) ?? $("#title")
  after.focus()
  if (!invalid) say(button.dataset.done ?? $("#title").textContent)
}

document.addEventListener("submit", async event => {
  const form = event.target, button = event.submitter
  if (form.method !== "post") return
  event.preventDefault()
  if (busy) return
  busy = true
  begin(form.dataset.busy ?? "")
  try {
    await send(form, button)
  } catch (error) {
    done()
    if (error instanceof TypeError) tell("gone", GONE, "Try now", refresh)
    else tell("failed", `That did not work: ${error.message}`, "Try again", () => form.requestSubmit(button))
  }
  busy = false
})
