// The page at `/` in a headless browser, against a server of scripted answers.

import assert from "node:assert/strict";
import { chromium } from "playwright-core";

const base = process.argv[2];
const browser = await chromium.launch({ executablePath: "/usr/bin/chromium", args: ["--no-sandbox"] });
const page = await browser.newPage({ viewport: { width: 375, height: 700 } });
const requests = [], problems = [];
page.on("request", (request) => requests.push(request.url()));
page.on("pageerror", (error) => problems.push(error.message));
page.on("dialog", (dialog) => { problems.push("a dialog: " + dialog.message()); dialog.dismiss(); });

async function ask(text) {
  await page.fill("#input", text);
  await page.press("#input", "Enter");
  await page.waitForFunction(() => document.querySelector("#send").textContent === "Send" &&
    document.querySelector("#log > article:last-child .stats"));
}
const last = (selector) => page.locator("#log > article:last-child " + selector);

await page.goto(base + "/");
await ask("[thinking]");
assert.equal(await last(".text").textContent(), "Hello there!");
assert.equal(await last("details").getAttribute("open"), null, "thinking is folded");
await last("summary").click();
assert.match(await last("details").textContent(), /I am thinking\./);
assert.match(await last(".stats").textContent(), /tokens of context/);

// What the model writes stays text.
await page.selectOption("#effort", "none");
await ask("[markup]");
assert.equal(await last(".text").textContent(), "<script>alert(1)</script> and **bold**");
assert.equal(await page.locator("#log script").count(), 0);

await last("button >> text=Regenerate").click();
await page.waitForFunction(() => document.querySelector("#log > article:last-child .stats"));
assert.equal(await page.locator("#log > article").count(), 4);

// Stopping an endless answer by keyboard.
await page.fill("#input", "[long]");
await page.press("#input", "Enter");
await page.waitForFunction(() => document.querySelector("#log > article:last-child .text").textContent.length > 20);
await page.keyboard.press("Escape");
await page.waitForFunction(() => document.querySelector("#send").textContent === "Send");

const overflow = await page.evaluate(() => document.documentElement.scrollWidth > innerWidth);
assert.equal(overflow, false, "the page fits a phone's width");
for (const scheme of ["dark", "light"]) {
  await page.emulateMedia({ colorScheme: scheme });
  const colour = await page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  assert.equal(colour, scheme === "dark" ? "rgb(22, 24, 29)" : "rgb(255, 255, 255)");
}
assert.deepEqual(problems, []);
assert.ok(requests.every((url) => url.startsWith(base) || url.startsWith("data:")), "no foreign requests");
await browser.close();
console.log("the page: as expected");
