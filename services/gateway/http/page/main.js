// Who is it, which view is seen, and the clock of the live view.

import { key, Refused } from "./api.js";
import * as chat from "./chat.js";
import { find } from "./dom.js";
import { look } from "./machine.js";

const EVERY_MS = 1000;
const main = document.querySelector("main");
let isIn = false;

function view(name) {
  main.dataset.view = name;
  for (const each of ["chat", "machine"]) find(`tab-${each}`).setAttribute("aria-pressed", String(each === name));
}

async function enter() {
  try {
    await chat.start();
    isIn = true;
    main.hidden = false;
    find("door").hidden = true;
    find("leave").hidden = !key.get();
    find("prompt").focus();
  } catch (error) {
    stayOut(error);
  }
}

function stayOut(error) {
  isIn = false;
  main.hidden = true;
  find("door").hidden = false;
  find("leave").hidden = true;
  find("state").textContent = "";
  find("door-error").textContent = key.get() ? error.message : "";
  key.forget();
  find("key").focus();
}

async function tick() {
  if (isIn && !document.hidden) {
    try {
      await look();
    } catch (error) {
      if (error instanceof Refused && error.status === 401) stayOut(error);
      else {
        find("state").className = "bad";
        find("state").textContent = error instanceof Refused ? error.message : "the gateway does not answer";
      }
    }
  }
  setTimeout(tick, EVERY_MS);
}

find("door").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(find("key").value.trim());
  find("key").value = "";
  enter();
});
find("leave").addEventListener("click", () => stayOut(new Error("")));
for (const name of ["chat", "machine"]) find(`tab-${name}`).addEventListener("click", () => view(name));
view("chat");
chat.listen();
enter().then(tick);
