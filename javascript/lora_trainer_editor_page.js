// The elements of the caption editor, without what they show (lora_trainer_editor.js). `act` is what its buttons do.
(function() {
    "use strict";

    const parts = window.loraTrainerEditorParts = window.loraTrainerEditorParts || {};

    parts.make = make;
    parts.button = button;
    parts.page = function(act) {
        const made = {};
        made.error = labelled(make("div", {className: "lt-error"}), "alert");
        const panes = make("div", {className: "lt-panes"}, pane(made, act),
            make("aside", {}, detail(made, act), change(made, act), tags(made, act)));
        made.root = labelled(make("div", {id: "lora_trainer_editor", tabIndex: -1}, head(made, act), made.error, panes),
            "dialog", "Captions");
        made.root.setAttribute("aria-modal", "true");
        return made;
    };

    function make(tag, properties, ...children) {
        const element = Object.assign(document.createElement(tag), properties);
        element.append(...children);
        return element;
    }

    function button(text, title, onclick, className) {
        return make("button", {type: "button", textContent: text, title, onclick, className: className || "lt-button"});
    }

    function labelled(element, role, label) {
        if (role) element.setAttribute("role", role);
        if (label) element.setAttribute("aria-label", label);
        return element;
    }

    function field(placeholder, onenter) {
        const input = labelled(make("input", {type: "text", placeholder, autocomplete: "off"}), null, placeholder);
        if (onenter) input.addEventListener("keydown", (event) => event.key === "Enter" && !event.ctrlKey && onenter());
        return input;
    }

    function head(made, act) {
        made.title = make("b", {});
        made.count = make("span", {className: "lt-count"});
        made.words = field("Search in names and captions");
        made.words.type = "search";
        made.words.addEventListener("input", act.type);
        made.without = button("", "Show only pictures without a caption", act.without);
        made.chips = make("div", {className: "lt-chips"});
        made.undo = button("Undo", "", act.undo);
        return make("header", {}, made.title, made.count, made.words, made.without, made.chips, made.undo,
            button("Close", "Close (Esc)", act.close));
    }

    function pane(made, act) {
        made.notes = make("div", {className: "lt-note"});
        made.grid = labelled(make("div", {className: "lt-grid", tabIndex: 0, onclick: act.pick, ondblclick: act.write}),
            "listbox", "Pictures");
        made.grid.setAttribute("aria-multiselectable", "true");
        made.said = labelled(make("span", {className: "lt-said"}), "status");
        made.previous = button("‹", "Page before (Page Up)", () => act.turn(-1));
        made.next = button("›", "Next page (Page Down)", () => act.turn(1));
        made.where = make("span", {});
        return make("div", {className: "lt-main-pane"}, made.notes, made.grid,
            make("div", {className: "lt-foot"}, made.said, made.previous, made.where, made.next));
    }

    function detail(made, act) {
        made.large = make("img", {alt: "", className: "lt-large"});
        made.name = make("div", {className: "lt-name"});
        made.home = make("span", {className: "lt-home"});
        const placeholder = "What this picture shows, in words or tags";
        made.caption = labelled(make("textarea", {rows: 4, spellcheck: true, placeholder}), null, "Caption");
        const save = button("Save, next", "Save and go to the next picture (Ctrl+Enter)", act.save,
            "lt-button lt-primary");
        made.detail = make("section", {}, made.large, made.name, made.caption,
            make("div", {className: "lt-line"}, save, made.home));
        return made.detail;
    }

    function change(made, act) {
        const add = (front) => act.many({kind: "add", tags: made.tag.value, front});
        const remove = () => act.many({kind: "remove", tags: made.tag.value});
        const replace = () => act.many({kind: "replace", old: made.old.value, new: made.replacement.value,
            text: made.any.checked});
        made.scope = make("span", {});
        made.clear = button("select none", "Esc", act.clear, "lt-link");
        made.tag = field("tag, or several", () => add(false));
        made.old = field("this tag", replace);
        made.replacement = field("by this", replace);
        made.any = make("input", {type: "checkbox"});
        return make("section", {}, make("div", {className: "lt-title"}, made.scope, " ", made.clear),
            make("div", {className: "lt-line"}, made.tag,
                button("Add", "At the end of each caption that lacks it", () => add(false)),
                button("In front", "In front of each caption that lacks it", () => add(true)),
                button("Remove", "From each caption", remove)),
            make("div", {className: "lt-line"}, made.old, made.replacement, button("Replace", "", replace)),
            make("label", {}, made.any, " any text, not only a whole tag"));
    }

    function tags(made, act) {
        made.order = button("", "Order of the tags", act.order, "lt-link");
        made.tags = make("div", {className: "lt-tags"});
        return make("section", {className: "lt-tag-list"},
            make("div", {className: "lt-title"}, "Tags ", made.order), made.tags);
    }
})();
