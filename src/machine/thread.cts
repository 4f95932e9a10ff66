import path = require('node:path');
import bundle = require('../bundle.cjs');

/** Entry of a machine thread. */
if (bundle.bundled) bundle.run(path.join(__dirname, 'machine-thread.cjs'), require);
else void import('./machine-thread.js');
