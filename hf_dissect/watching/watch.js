"use strict";

// Renews the page of a run: asks for its version, and when that changed, fetches the page and replaces what differs.

const WAIT = 2000; // milliseconds
const PATIENCE = 15000;
const line = document.getElementById("status");
const age = document.getElementById("age");
let version = line.dataset.version;

async function ask(path) {
  const response = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
  if (!response.ok) throw new Error(`status ${response.status}`);
  return response;
}

function copyAttributes(shown, next) {
  for (const { name } of [...shown.attributes]) {
    // What the reader opened stays open.
    if (!next.hasAttribute(name) && !(name === "open" && shown.localName === "details")) shown.removeAttribute(name);
  }
  for (const { name, value } of [...next.attributes]) {
    if (name === "open" && shown.localName === "details") continue;
    if (shown.getAttribute(name) !== value) shown.setAttribute(name, value);
  }
}

function renew(shown, next) {
  if (shown === age || shown.isEqualNode(next)) return;
  const alike = shown.nodeType === Node.ELEMENT_NODE && next.nodeType === Node.ELEMENT_NODE && shown.nodeName === next.nodeName;
  if (!alike || shown.namespaceURI !== document.documentElement.namespaceURI) {
    shown.replaceWith(document.importNode(next, true));
    return;
  }
  copyAttributes(shown, next);
  const nexts = [...next.childNodes];
  while (shown.childNodes.length > nexts.length) shown.lastChild.remove();
  nexts.forEach((child, place) => {
    if (place < shown.childNodes.length) renew(shown.childNodes[place], child);
    else shown.append(document.importNode(child, true));
  });
}

function describe(seconds) {
  if (seconds === null) return "";
  if (seconds < 90) return `Last written ${Math.round(seconds)} s ago.`;
  if (seconds < 5400) return `Last written ${Math.round(seconds / 60)} min ago.`;
  return `Last written ${Math.round(seconds / 3600)} h ago.`;
}

async function look() {
  try {
    const now = await (await ask("/version")).json();
    if (now.version !== version) {
      const page = new DOMParser().parseFromString(await (await ask("/")).text(), "text/html");
      const place = [window.scrollX, window.scrollY];
      for (const name of ["header", "main"]) renew(document.querySelector(name), page.querySelector(name));
      document.title = page.title;
      version = line.dataset.version;
      window.scrollTo(...place);
    }
    age.textContent = describe(now.age);
  } catch {
    age.textContent = "The server does not answer, or cannot read the folder; this page is as it was before.";
  }
}

async function watch() {
  if (!document.hidden) await look();
  setTimeout(watch, WAIT);
}

watch();
