// Keeps the tab "Train LoRA" up to date: it clicks a hidden button, whose short event asks the server for the
// state of the jobs. Every second while a job is active, every 5 s otherwise, and only while the tab can be seen.
(function() {
    "use strict";

    const ACTIVE_MS = 1000;
    const IDLE_MS = 5000;
    const LOST_MS = 15000;

    let askedAt = 0;
    let askedBeat = null;

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
        if (!visible()) return;
        const {active, beat: latest} = beat();
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

    document.addEventListener("click", function(event) {
        const target = event.target.closest ? event.target.closest("[data-lora-trainer-stop], [data-lora-trainer-show]") : null;
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

    document.addEventListener("visibilitychange", look);
    setInterval(look, 250);
})();
