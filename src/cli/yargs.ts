// The CommonJS build: the other one breaks lines of help inside words.
import yargs = require('yargs/yargs');

export { yargs };
