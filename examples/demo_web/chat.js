// Sends a message and shows the answer word by word.
import { $, refresh } from "/web/page.js"

const talk = $("#talk"), form = $("#ask"), send = $("#send"), stop = $("#stop")
let leave = null // ends the answer that is under way

function line(kind, text) {
  const place = document.createElement("p")
  place.className = kind
  place.textContent = text
  talk.append(place)
  return place
}

// The events of a stream, as pairs of kind and data.
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
  let text = ""
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const events = (text + part.value).split("\n\n")
    text = events.pop()
    for (const event of events) yield event.match(/^event: (\w+)\ndata: (.*)$/s).slice(1)
  }
}

async function ask(answer) {
  const response = await fetch("/chat", { method: "POST", body: new URLSearchParams(new FormData(form)), signal: leave.signal })
  if (!response.ok) throw new Error(await response.text())
  for await (const [kind, data] of eventsOf(response)) {
    if (kind === "done") {
      form.reset()
      return `Counted and stored: this was message ${data}.`
    }
    answer.textContent += data + " "
  }
  throw new TypeError("the stream ended early")
}

function reason(error) {
  if (error.name === "AbortError") return "You hung up, so it is not counted."
  if (error instanceof TypeError) return "The answer broke off. The number of messages below tells whether it is counted."
  return error.message
}

form.addEventListener("submit", async event => {
  event.preventDefault()
  if (leave) return
  leave = new AbortController()
  send.ariaDisabled = "true"
  stop.ariaDisabled = "false"
  talk.ariaBusy = "true" // read aloud as a whole, when it is complete
  talk.replaceChildren()
  line("mine", form.question.value)
  const answer = line("answer", "")
  const outcome = await ask(answer).catch(reason)
  line("fact", outcome)
  talk.ariaBusy = "false"
  leave = null
  send.ariaDisabled = "false"
  stop.ariaDisabled = "true"
  refresh()
})

stop.onclick = () => leave?.abort()
