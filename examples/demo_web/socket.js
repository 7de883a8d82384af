// Sends clicks over a WebSocket, which the first one opens. How many there are, the page asks like all it shows.
import { $, refresh } from "/web/page.js"

const state = $("#state")
let socket = null

const CLOSED = {
  4001: "This session has ended, so the click is not stored. The next click begins a new one.",
  1006: "The connection is gone. The next click tries to connect again.",
  1012: "The server is being stopped. The next click tries to connect again.",
}

function connect() {
  state.textContent = "connecting"
  socket = new WebSocket(location.origin.replace("http", "ws") + "/socket/clicks")
  socket.onmessage = async () => {
    await refresh()
    state.textContent = "connected, stored"
  }
  socket.onclose = event => {
    socket = null
    state.textContent = CLOSED[event.code] ?? "Closed. The next click connects again."
    refresh()
  }
}

$("#click").onclick = () => {
  if (!socket) connect()
  if (socket.readyState === WebSocket.OPEN) socket.send("click")
  else socket.addEventListener("open", event => event.target.send("click"))
}
