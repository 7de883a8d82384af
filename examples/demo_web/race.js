// Starts the race and shows what became of the writes in each mode.
import { $, GONE } from "/web/page.js"

const LANES = ["auto", "locked", "versions", "naive"]
const button = $("#run"), result = $("#result")

function wordsOf(lane) {
  const parts = [`${lane.stored} stored`, lane.refused && `${lane.refused} refused`, `${lane.lost} lost`, `${lane.ms} ms`]
  return parts.filter(Boolean).join(", ")
}

function show(name, writers, lane) {
  const place = document.getElementById(name), verdict = place.querySelector(".verdict")
  for (const part of ["stored", "refused", "lost"])
    place.querySelector("." + part).style.width = 100 * lane[part] / writers + "%"
  verdict.textContent = wordsOf(lane)
  verdict.dataset.outcome = lane.lost ? "lost" : lane.refused ? "refused" : "stored"
}

async function run() {
  const answer = await fetch("/race/run", { method: "POST" })
  if (!answer.ok) throw new Error(await answer.text())
  const results = await answer.json()
  for (const name of LANES) show(name, results.writers, results[name])
  const { auto, versions, naive, writers } = results
  return `With a lock, ${auto.stored} of ${writers} writes are stored. Comparing versions refused ${versions.refused} and told the`
    + ` clients. Where the last writer wins, ${naive.lost} are lost, and nobody was told.`
}

button.onclick = async () => {
  if (button.ariaDisabled === "true") return
  button.ariaDisabled = "true"
  result.textContent = "The race is on."
  try {
    result.textContent = await run()
    button.textContent = "Run it again"
  } catch (error) {
    result.textContent = error instanceof TypeError ? GONE : `The race broke off: ${error.message}`
    button.textContent = "Try again"
  }
  button.ariaDisabled = "false"
}

if (new URLSearchParams(location.search).has("run")) button.click()
