// The small pictures of the caption editor: fetched a few at once, kept for a while, given back.
(function() {
    "use strict";

    const LOADS = 4;
    const KEPT = 400;
    const parts = window.loraTrainerEditorParts = window.loraTrainerEditorParts || {};

    // `address` gives the URL and headers of a picture by its name and size.
    parts.Pictures = class {
        constructor(address) {
            this.address = address;
            this.kept = new Map(); // name: blob URL
            this.loading = new AbortController();
        }

        async load(name, size, signal) {
            const [url, headers] = this.address(name, size);
            const response = await fetch(url, {headers, signal});
            if (!response.ok) throw new Error((await response.json()).errors.join("\n"));
            return URL.createObjectURL(await response.blob());
        }

        // Into `tiles`, [name, image, cell] each: the first ones first. Another page gives up what is left of this one.
        fill(tiles) {
            this.loading.abort();
            this.loading = new AbortController();
            const {signal} = this.loading;
            const waiting = tiles.filter(([name, image]) => !this.show(name, image));
            const next = async() => {
                for (let tile = waiting.shift(); tile && !signal.aborted; tile = waiting.shift()) {
                    const [name, image, cell] = tile;
                    try {
                        this.kept.set(name, await this.load(name, "small", signal));
                        this.show(name, image);
                    } catch (error) {
                        if (signal.aborted) return;
                        cell.classList.add("lt-broken");
                        cell.title = error.message;
                    }
                }
            };
            for (let at = 0; at < LOADS; at++) next();
            this.forget(KEPT);
        }

        show(name, image) {
            if (this.kept.has(name)) image.src = this.kept.get(name);
            return this.kept.has(name);
        }

        forget(most) {
            for (const [name, url] of this.kept) {
                if (this.kept.size <= most) break;
                URL.revokeObjectURL(url);
                this.kept.delete(name);
            }
        }

        close() {
            this.loading.abort();
            this.forget(0);
        }
    };
})();
