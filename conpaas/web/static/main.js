// What every page needs; the rest of the modules do one thing each.
import "./actions.js";
import "./dialog.js";
import "./theme.js";
import "./time.js";
import "./scale.js";
import "./upload.js";
import "./log.js";
import "./charts.js";
import "./live.js";
