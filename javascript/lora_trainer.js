// Keeps the tab "Train LoRA" up to date: it clicks a hidden button, whose short event asks the server for the
// state of the jobs. Every second while a job is active, every 5 s otherwise, and only while the tab can be seen.
(function() {
    "use strict";

    const ACTIVE_MS = 1000;
    const IDLE_MS = 5000;
    const LOST_MS = 15000;
    // A second click that comes this soon belongs to a double click.
    const DOUBLE_MS = 1000;
    const DROP = "#lora_trainer_drop";
    const SUBMITS = "#lora_trainer_train, #lora_trainer_try_out, #lora_trainer_find_rate";

    let askedAt = 0;
    let askedBeat = null;
    let submit = {at: 0, answer: ""};
    let sendAnswer = "";

    function find(selector) {
        const root = typeof gradioApp === "function" ? gradioApp() : document;
        return root.querySelector(selector);
    }

    function button(id) {
        return find(`button#${id}, #${id} button`);
    }

    function beat() {
        const mark = find("#lora_trainer_beat [data-beat]");
        return mark ? mark.dataset : {active: "0", beat: ""};
    }

    // When the server last wrote this text: another time for each answer.
    function answer(id) {
        const mark = find(`#${id} [data-at]`);
        return mark ? mark.dataset.at : "";
    }

    // Whether pictures are on their way; the drop zone says so as long.
    function sending() {
        const zone = find(DROP);
        if (zone && answer("lora_trainer_received") !== sendAnswer) delete zone.dataset.sending;
        return Boolean(zone && zone.dataset.sending);
    }

    function visible() {
        const tab = find("#lora_trainer");
        return document.visibilityState === "visible" && tab !== null && tab.offsetParent !== null;
    }

    function ask() {
        const tick = button("lora_trainer_tick");
        if (!tick) return;
        askedAt = Date.now();
        askedBeat = beat().beat;
        tick.click();
    }

    function look() {
        sending();
        if (!visible()) return;
        const {active: training, beat: latest} = beat();
        const active = find(".lt-captions[data-active='1']") ? "1" : training;
        const waited = Date.now() - askedAt;
        // A slow server is not asked again before it has answered, unless the answer got lost.
        if (askedBeat === latest && waited < LOST_MS && askedAt) return;
        if (waited >= (active === "1" ? ACTIVE_MS : IDLE_MS) - 50) ask();
    }

    function pick(id) {
        const input = find("#lora_trainer_picked textarea, #lora_trainer_picked input");
        if (!input) return;
        input.value = id;
        input.dispatchEvent(new Event("input", {bubbles: true}));
    }

    function closest(event, selector) {
        return event.target.closest ? event.target.closest(selector) : null;
    }

    // Only one job for a double click, an impatient one, or one before the pictures have arrived.
    document.addEventListener("click", function(event) {
        // Choosing again gives up an upload that failed on its way.
        if (closest(event, "#lora_trainer_upload")) delete find(DROP).dataset.sending;
        if (!closest(event, SUBMITS)) return;
        const waited = Date.now() - submit.at;
        const unanswered = answer("lora_trainer_message") === submit.answer && waited < LOST_MS;
        if (waited < DOUBLE_MS || unanswered || sending()) {
            event.preventDefault();
            event.stopImmediatePropagation();
            return;
        }
        submit = {at: Date.now(), answer: answer("lora_trainer_message")};
    }, true);

    document.addEventListener("click", function(event) {
        const target = closest(event, "[data-lora-trainer-stop], [data-lora-trainer-show]");
        if (!target) return;
        const {loraTrainerStop, loraTrainerShow} = target.dataset;
        pick(loraTrainerStop || loraTrainerShow);
        // The text reaches gradio's store in its own turn.
        setTimeout(function() {
            if (loraTrainerStop) {
                button("lora_trainer_stop_picked").click();
            } else {
                ask();
            }
        }, 50);
    });

    // Pictures, by the button or dropped on it; a folder with all that it holds.
    document.addEventListener("change", function(event) {
        const zone = closest(event, DROP);
        const count = zone && event.target.files ? event.target.files.length : 0;
        if (!count) return;
        sendAnswer = answer("lora_trainer_received");
        zone.dataset.sending = `Sending ${count} file${count === 1 ? "" : "s"}…`;
    }, true);

    async function filesIn(entry) {
        if (entry.isFile) return [await new Promise((done, failed) => entry.file(done, failed))];
        const reader = entry.createReader();
        const inside = [];
        for (;;) {
            const some = await new Promise((done, failed) => reader.readEntries(done, failed));
            if (!some.length) break;
            inside.push(...some);
        }
        return (await Promise.all(inside.map(filesIn))).flat();
    }

    async function drop(zone, transfer) {
        // The event takes them back at the first await.
        const items = Array.from(transfer.items).filter((item) => item.kind === "file");
        const taken = items.map((item) => [item.webkitGetAsEntry(), item.getAsFile()]);
        const files = (await Promise.all(taken.map(([entry, file]) => entry ? filesIn(entry) : [file]))).flat();
        const input = zone.querySelector("input[type=file]");
        if (!files.length || !input) return;
        const list = new DataTransfer();
        files.forEach((file) => list.items.add(file));
        input.files = list.files;
        input.dispatchEvent(new Event("change", {bubbles: true}));
    }

    for (const name of ["dragover", "dragleave", "drop"]) {
        document.addEventListener(name, function(event) {
            const zone = closest(event, DROP);
            if (!zone) return;
            event.preventDefault();
            event.stopPropagation();
            zone.classList.toggle("lt-over", name === "dragover");
            if (name === "drop") drop(zone, event.dataTransfer);
        }, true);
    }

    document.addEventListener("visibilitychange", look);
    setInterval(look, 250);
})();
